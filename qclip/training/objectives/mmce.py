"""Maximum mean calibration error (Kumar et al. 2018, PMLR 80), squared, without its diagonal, which is biased; on pairs
that no other term sees, as `esd`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Features
from .esd import answers

WIDTH = 0.4  # of the kernel, as in the authors' code


def mmce(confidence: Tensor, right: Tensor) -> Tensor:
    """`sum_{i != j} (a_i - c_i)(a_j - c_j) exp(-|c_i - c_j| / 0.4) / (n (n - 1))`. Mean 0 where calibrated; of fewer
    than two answers 0. The gradient is by the confidences."""
    n = len(confidence)
    if n < 2:
        return confidence.sum() * 0
    gap = right - confidence
    near = torch.exp(-(confidence[:, None] - confidence).abs() / WIDTH)
    return ((gap[:, None] * gap * near).sum() - gap.square().sum()) / (n * (n - 1))


class MMCE:
    """Kernel calibration error among the captions of pairs that no other term sees"""

    name = "mmce"
    needs = frozenset({"apart"})

    def __call__(self, features: Features) -> Tensor:
        assert features.apart is not None
        return mmce(*answers(features.apart, features.scale))
