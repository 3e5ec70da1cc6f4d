"""OFQ (Liu et al. 2023, arXiv 2302.02210): weight scales from statistics (StatsQ), which no step of the optimizer sets
swinging, and weights that hop between two codes are calmed: drawn towards their code, and frozen where they go on
(Nagel et al. 2022, arXiv 2203.11086). Its product of query and key weights does not fit CLIP's biases and is left out.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from qkernels.contract import SMALLEST_NORMAL_HALF, TINY

from ...errors import RecipeError
from ...recipes import Treatment
from ..quantizer import WeightRounding, straight_through
from . import starts
from .lsq import LSQ
from .variation import rising

FIRST = 0.25  # share of the steps in which weights are left alone
MOST_BITS = 4  # with more, a hop is too small to matter


@dataclasses.dataclass(frozen=True)
class Options(starts.Options):
    """`scale_start`: as of LSQ, of inputs. `damping`: strength at the end of what draws weights to
    their codes. `threshold`: hops per step, a running mean of `momentum`, above which a weight is frozen, at first and
    at the end; 0 at first: never."""

    damping: float = 0.1
    threshold: float = 0.1
    last_threshold: float = 0.01
    momentum: float = 0.01

    def __post_init__(self) -> None:
        for name in ("damping", "threshold", "last_threshold"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name):g}")
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum must lie above 0 and not above 1, not at {self.momentum:g}")


class StatisticWeight(WeightRounding):
    """`S (rne(n clamp(w/S, -1, 1 - 1e-6) - 1/2) + 1/2) / n`, S twice the mean |w| of a channel, `n = 2^(b-1)`; the
    gradient passes, also where a weight is clipped. What swings is kept track of in codes."""

    frozen: Tensor
    codes: Tensor
    mean: Tensor
    direction: Tensor
    hops: Tensor

    def __init__(self, weight: Tensor, plan: Treatment, options: Options) -> None:
        super().__init__(weight, plan)
        if self.grid.kind != "midrise" or self.grid.group is not None:
            raise RecipeError(f"OFQ's weights lie on the grid 'midrise' of a channel, not on {self.grid}")
        self.as_half, self.options = self.grid.container == "Int4Weight", options
        self.calms = self.grid.bits <= MOST_BITS
        for name in ("frozen", "codes", "mean", "direction", "hops") if self.calms else ():
            self.register_buffer(name, torch.zeros_like(weight, requires_grad=False))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        if self.calms:
            self.codes.copy_(self._codes(weight))
            self.mean.copy_(self.codes)
            for track in (self.frozen, self.direction, self.hops):
                track.zero_()

    @torch.no_grad()
    def scales(self, weight: Tensor) -> Tensor:
        scales = 2 * weight.abs().mean(1, keepdim=True) / 2 ** (self.grid.bits - 1)
        return scales.clamp(min=SMALLEST_NORMAL_HALF).half().float() if self.as_half else scales.clamp(min=TINY)

    @torch.no_grad()
    def _codes(self, weight: Tensor) -> Tensor:
        n = 2 ** (self.grid.bits - 1)
        codes = torch.round((weight / self.scales(weight)).clamp(-n, n * (1 - 1e-6)) - 0.5) + n
        return torch.where(self.frozen > 0, self.codes, codes) if self.calms else codes

    def forward(self, weight: Tensor) -> Tensor:
        values = (self._codes(weight) - self.grid.high / 2) * self.scales(weight)
        learns = weight
        if self.calms:  # a frozen weight learns nothing
            learns = torch.where(self.frozen > 0, weight.detach(), weight)
        return straight_through(learns, values)

    def penalty(self, x: Tensor, done: float) -> Tensor | None:
        if not self.calms or not self.options.damping or done <= FIRST:
            return None
        strength = self.options.damping * rising(done, FIRST)
        n = 2 ** (self.grid.bits - 1)
        scales = self.scales(x)
        inside = x.clamp(-n * scales, n * scales)
        return strength * (self(x).detach() - inside).square().sum()

    @torch.no_grad()
    def after(self, x: Tensor, done: float) -> None:
        if not self.calms:
            return
        codes, m = self._codes(x), self.options.momentum
        moved = (codes - self.codes).sign()
        hopped = (moved != 0) & (moved == -self.direction)
        self.hops.lerp_(hopped.float(), m)
        self.mean.lerp_(codes, m)
        self.direction.copy_(torch.where(moved != 0, moved, self.direction))
        self.codes.copy_(codes)
        if done > FIRST and self.options.threshold:
            share = (done - FIRST) / (1 - FIRST)
            last = self.options.last_threshold
            most = last + (self.options.threshold - last) * 0.5 * (1 + math.cos(math.pi * share))
            new = (self.hops > most) & (self.frozen == 0)
            self.codes.copy_(torch.where(new, self.mean.round(), self.codes))
            self.frozen.masked_fill_(new, 1.0)


class OFQ(LSQ):
    """Weight scales from statistics, weights that hop between codes calmed"""

    name = "ofq"
    from_codes = False
    paper = starts.Paper(starts.lsq, starts.ofq_input)
    options = Options
    chosen: Options

    @classmethod
    def treatment(cls, plan: Treatment) -> Treatment:
        return dataclasses.replace(
            super().treatment(plan), group=None, weight_grid="midrise", weight_observer="min-max"
        )

    def weight(self, weight: Tensor, plan: Treatment) -> WeightRounding:
        return (
            StatisticWeight(weight, plan, self.chosen) if plan.grid.kind == "midrise" else super().weight(weight, plan)
        )
