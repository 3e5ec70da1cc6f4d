"""PACT (Choi et al. 2018, arXiv 1805.06085), on both sides of 0: inputs are clipped at a learned bound, which only what
is clipped makes larger and its own decay makes smaller. Weights are LSQ's.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

import qkernels

from ...recipes import FLOAT, Treatment
from . import starts
from .lsq import LSQ, LearnedInput
from .ste import SYM


@dataclasses.dataclass(frozen=True)
class Options(starts.Options):
    """`decay`: of the squared bounds, a part of the method. `scale_start`: as of LSQ."""

    decay: float = 1e-4

    def __post_init__(self) -> None:
        if not self.decay >= 0:
            raise ValueError(f"decay must be at least 0, not {self.decay:g}")


class ClippedInput(LearnedInput):
    """The bound is the largest code times the scale."""

    def __init__(self, plan: Treatment, values: int, decay: float) -> None:
        super().__init__(plan, values)
        self.decay = decay

    def forward(self, x: Tensor) -> Tensor:
        scale = self.learned()
        return qkernels.fake_quantize(x, scale, None, self.low, self.high, "pact", grad_scale=self.step)

    def penalty(self, x: Tensor, done: float) -> Tensor:
        return self.decay * (self.learned() * self.high).square()


class PACT(LSQ):
    """Inputs clipped at a learned bound"""

    name = "pact"
    options = Options
    paper = starts.Paper(starts.lsq, starts.pact)
    chosen: Options

    @classmethod
    def treatment(cls, plan: Treatment) -> Treatment:
        found = super().treatment(plan)
        return found if plan.activation_bits == FLOAT else dataclasses.replace(found, activation_grid=SYM)

    def learned_input(self, plan: Treatment, values: int) -> LearnedInput:
        return ClippedInput(plan, values, self.chosen.decay)
