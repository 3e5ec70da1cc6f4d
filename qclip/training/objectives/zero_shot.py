"""Distance of zero-shot probabilities over a list of class names, which needs no labels, to the float model's."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Features
from .similarity import divergence


class ZeroShot:
    """KL of the probabilities of each image over a list of classes, each at its own model's scale"""

    name = "zero-shot"
    needs = frozenset({"classes"})

    def __call__(self, features: Features) -> Tensor:
        assert features.classes is not None and features.teacher_classes is not None
        with torch.no_grad():
            wanted = features.teacher_scale * features.teacher_image @ features.teacher_classes.T
        return divergence(wanted, features.scale * features.image @ features.classes.T)
