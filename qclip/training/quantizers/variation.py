"""Variation-aware training (Huang et al. 2023, arXiv 2307.00331): LSQ whose weight scales' gradients are divided by the
size of the weight, and a penalty that draws the weights of a code together.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ...recipes import Treatment
from . import starts
from .lsq import LSQ, LearnedWeight


@dataclasses.dataclass(frozen=True)
class Options(starts.Options):
    """`together`: the penalty's strength at the end; it rises from 0 by a cosine."""

    together: float = 0.01

    def __post_init__(self) -> None:
        if not self.together >= 0:
            raise ValueError(f"together must be at least 0, not {self.together:g}")


def rising(done: float, first: float = 0.0) -> float:
    """0 up to the share `first` of the steps, then by half a cosine to 1 at the end."""
    return 0.5 * (1 - math.cos(math.pi * max(0.0, done - first) / (1 - first)))


class VariationWeight(LearnedWeight):
    """Steps of the scale of `1 / sqrt(|w|_1 Qp)`."""

    def __init__(self, weight: Tensor, plan: Treatment, together: float) -> None:
        super().__init__(weight, plan)
        self.together = together
        size = float(weight.detach().abs().sum())
        self.step = 1 / math.sqrt(max(size, 1e-12) * max(self.grid.high, 1))

    def penalty(self, x: Tensor, done: float) -> Tensor | None:
        """Squared distance of each weight, in steps, to the mean of those that have its code."""
        if not self.together or not done:
            return None
        with torch.no_grad():
            steps = self.scales(x).repeat_interleave(self.group, dim=1)[:, : x.shape[1]]
            codes = torch.round(self(x) / steps + self.zero - self.grid.low).long()
            places = codes + torch.arange(len(x), device=x.device)[:, None] * (self.grid.high - self.grid.low + 1)
            count = len(x) * (self.grid.high - self.grid.low + 1)
            sums = torch.zeros(count, device=x.device).index_add_(0, places.flatten(), (x / steps).flatten())
            many = torch.bincount(places.flatten(), minlength=count).clamp(min=1)
            middle = (sums / many)[places]
        return self.together * rising(done) * (x / steps - middle).square().mean()


class Variation(LSQ):
    """LSQ with steps by the size of the weight, and weights of a code drawn together"""

    name = "variation"
    options = Options
    paper = starts.Paper()  # at the least squared error, too
    chosen: Options

    def learned_weight(self, weight: Tensor, plan: Treatment) -> LearnedWeight:
        return VariationWeight(weight, plan, self.chosen.together)
