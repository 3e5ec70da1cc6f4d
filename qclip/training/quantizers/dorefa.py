"""DoReFa (Zhou et al. 2016, arXiv 1606.06160): weights through tanh onto an even grid, whose scale the method loses and
which is restored here, for each channel, by least squares. Inputs are LSQ's, which theirs are once their scale is
learned.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import qkernels
from qkernels.contract import SMALLEST_NORMAL_HALF, TINY

from ...errors import RecipeError
from ...recipes import Treatment
from ..quantizer import WeightRounding
from . import starts
from .lsq import LSQ


class TanhWeight(WeightRounding):
    """`c (2 rne(t L) / L - 1)`, `t = tanh(w) / (2 max |tanh w|) + 1/2` per channel, `L = 2^b - 1`, c of least squares;
    the rounding passes gradients, tanh and its maximum are differentiated, c is held."""

    def __init__(self, weight: Tensor, plan: Treatment) -> None:
        super().__init__(weight, plan)
        if self.grid.kind != "midrise" or self.grid.group is not None:
            raise RecipeError(f"DoReFa's weights lie on the grid 'midrise' of a channel, not on {self.grid}")
        self.as_half = self.grid.container == "Int4Weight"

    def _levels(self, weight: Tensor) -> Tensor:
        """-1 .. 1 in steps of 2/L."""
        bent = torch.tanh(weight)
        t = (bent / (2 * bent.abs().amax(1, keepdim=True).clamp(min=TINY)) + 0.5).clamp(0, 1)
        return 2 * qkernels.fake_quantize(t, 1 / self.grid.high, None, 0, self.grid.high, "dorefa") - 1

    @torch.no_grad()
    def scales(self, weight: Tensor) -> Tensor:
        return self._scales(weight, self._levels(weight))

    @torch.no_grad()
    def _scales(self, weight: Tensor, levels: Tensor) -> Tensor:
        factor = (weight * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)
        scales = factor * 2 / self.grid.high
        return scales.clamp(min=SMALLEST_NORMAL_HALF).half().float() if self.as_half else scales.clamp(min=TINY)

    def forward(self, weight: Tensor) -> Tensor:
        levels = self._levels(weight)
        return levels * (self._scales(weight, levels.detach()) * self.grid.high / 2)


class DoReFa(LSQ):
    """Weights through tanh onto an even grid, its scale restored"""

    name = "dorefa"
    from_codes = False
    paper = starts.Paper(input=starts.dorefa)

    @classmethod
    def treatment(cls, plan: Treatment) -> Treatment:
        return dataclasses.replace(
            super().treatment(plan), group=None, weight_grid="midrise", weight_observer="min-max"
        )

    def weight(self, weight: Tensor, plan: Treatment) -> WeightRounding:
        return TanhWeight(weight, plan) if plan.grid.kind == "midrise" else super().weight(weight, plan)
