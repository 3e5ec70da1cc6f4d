"""EWGS (Lee et al. 2021, arXiv 2104.00903): a gradient is made larger or smaller by how far the value lies from its
code, in the direction in which the step goes. Scales are learned as LSQ's.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

import qkernels

from ...recipes import Treatment
from . import starts
from .lsq import LSQ, LearnedInput, LearnedWeight


@dataclasses.dataclass(frozen=True)
class Options(starts.Options):
    """`delta`: strength, per unit of the grid scaled to 0..1. `scale_start`: as of LSQ."""

    delta: float = 1e-3

    def __post_init__(self) -> None:
        if not self.delta >= 0:
            raise ValueError(f"delta must be at least 0, not {self.delta:g}")


class ScaledWeight(LearnedWeight):
    ESTIMATORS = ("ewgs", "ewgs")

    def __init__(self, weight: Tensor, plan: Treatment, delta: float) -> None:
        super().__init__(weight, plan)
        self.delta = delta


class ScaledInput(LearnedInput):
    def __init__(self, plan: Treatment, values: int, delta: float) -> None:
        super().__init__(plan, values)
        self.delta = delta

    def forward(self, x: Tensor) -> Tensor:
        scale = self.learned()
        offset = None if not float(self.zero) else -self.zero * scale
        return qkernels.fake_quantize(
            x, scale, offset, self.low, self.high, "ewgs", grad_scale=self.step, delta=self.delta
        )


class EWGS(LSQ):
    """LSQ whose gradients are scaled by the distance of each value to its code"""

    name = "ewgs"
    options = Options
    paper = starts.Paper(starts.ewgs_weight, starts.ewgs_input)
    chosen: Options

    def learned_weight(self, weight: Tensor, plan: Treatment) -> LearnedWeight:
        return ScaledWeight(weight, plan, self.chosen.delta)

    def learned_input(self, plan: Treatment, values: int) -> LearnedInput:
        return ScaledInput(plan, values, self.chosen.delta)
