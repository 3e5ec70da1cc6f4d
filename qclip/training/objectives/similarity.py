"""Distance of what a batch's images and captions say of each other to what they say in the float model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Features


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(teacher) || softmax(student)), nats."""
    return F.kl_div(
        F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), reduction="batchmean", log_target=True
    )


class Similarity:
    """KL of the rows and of the columns of `scale * image textT`, each at its own model's scale, halved"""

    name = "similarity"
    needs = frozenset({"pairs"})

    def __call__(self, features: Features) -> Tensor:
        with torch.no_grad():
            wanted = features.teacher_scale * features.teacher_image @ features.teacher_text.T
        found = features.scale * features.image @ features.text.T
        return (divergence(wanted, found) + divergence(wanted.T, found.T)) / 2
