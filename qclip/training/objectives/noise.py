"""What an altered image says of the batch's captions, to what the float model says of it unaltered.

After AugMix's consistency (Hendrycks et al. 2020, arXiv 1912.02781), with the float model's clean answer in place of
the mean of three. How images are altered: `alterations.VIEWS`, none of which is a corruption that `qclip evaluate`
measures. It pays for robustness with accuracy on clean images where its weight is large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Features
from .similarity import divergence


class Noise:
    """KL of an altered image's probabilities over the batch's captions, from the float model's of the clean one"""

    name = "noise"
    needs = frozenset({"pairs", "views"})

    def __call__(self, features: Features) -> Tensor:
        assert features.views is not None
        with torch.no_grad():
            wanted = features.teacher_scale * features.views.teacher @ features.teacher_text.T
        return divergence(wanted, features.scale * features.views.image @ features.text.T)
