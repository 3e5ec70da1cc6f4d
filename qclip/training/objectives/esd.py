"""Expected squared difference of confidence and accuracy (Yoon et al. 2023, arXiv 2303.02472), an unbiased estimate
without bins or parameters, on pairs that no other term sees: on those that are learned by heart every image finds its
caption, and all that is left to learn is to be sure.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import Apart, Features


def answers(apart: Apart, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image among the captions: the largest probability, and whether it is that of its own caption (0 or 1).
    Another image's equal caption is not among its answers."""
    logits = scale * apart.image @ apart.text.T
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill((apart.captions[:, None] == apart.captions) & ~own, -math.inf)
    confidence, found = logits.softmax(-1).max(-1)
    return confidence, (found == torch.arange(len(found), device=found.device)).to(confidence.dtype)


def esd(confidence: Tensor, right: Tensor) -> Tensor:
    """`mean_i [m_i^2 - v_i / (n - 1)]`, m_i and v_i mean and variance over j != i of `1[c_j <= c_i] (a_j - c_j)`: the
    squared gap up to each confidence, less what chance adds to it. Mean 0 where calibrated, so that it may be
    negative; of fewer than three answers 0. The gradient is by the confidences."""
    n = len(confidence)
    if n < 3:
        return confidence.sum() * 0
    below = (confidence[None, :] <= confidence[:, None]) & ~torch.eye(n, dtype=torch.bool, device=confidence.device)
    gaps = torch.where(below, right - confidence, 0.0)  # [i, j]
    mean = gaps.sum(1) / (n - 1)
    off = torch.eye(n, dtype=torch.bool, device=confidence.device)
    spread = torch.where(off, 0.0, gaps - mean[:, None]).square().sum(1) / (n - 2)
    return (mean.square() - spread / (n - 1)).mean()


class ESD:
    """Expected squared gap of confidence and accuracy among the captions of pairs that no other term sees"""

    name = "esd"
    needs = frozenset({"apart"})

    def __call__(self, features: Features) -> Tensor:
        assert features.apart is not None
        return esd(*answers(features.apart, features.scale))
