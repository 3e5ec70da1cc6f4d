"""LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576): inputs have a learned offset besides their scale, for what is not
symmetric, as GELU's outputs are. A layer takes the offset from its input before it rounds and gives it back by its
bias.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import qkernels

from ...layers.transforms import Shift
from ...ptq.base import SiteState
from ...recipes import FLOAT, Treatment
from . import starts
from .lsq import LSQ, LearnedInput
from .ste import ASYM, decide_static


class OffsetInput(LearnedInput):
    """A learned scale and a learned offset, counted in steps of the scale that training began with."""

    unit: Tensor

    def __init__(self, plan: Treatment, values: int) -> None:
        super().__init__(plan, values)
        self.steps = nn.Parameter(torch.zeros(()))
        self.register_buffer("unit", torch.ones(()))

    @torch.no_grad()
    def start(self, scale: Tensor, zero: Tensor | None) -> None:
        self.learned.start(scale)
        self.unit.copy_(scale)
        self.steps.copy_(torch.zeros(()) if zero is None else -zero)

    @property
    def offset(self) -> Tensor:
        """Of the code 0, in units of the input."""
        return self.steps * self.unit

    def forward(self, x: Tensor) -> Tensor:
        return qkernels.fake_quantize(
            x, self.learned(), self.offset, self.low, self.high, "lsq_plus", grad_scale=self.step
        )

    def decide(self, state: SiteState, width: int) -> None:
        state.transforms.append(Shift(self.offset.detach().expand(width).clone()))
        decide_static(state, self.plan, self.learned(), torch.zeros(()))


class LSQPlus(LSQ):
    """LSQ whose inputs have a learned offset"""

    name = "lsq-plus"
    paper = starts.Paper(starts.lsq_plus)  # inputs at the least squared error

    @classmethod
    def treatment(cls, plan: Treatment) -> Treatment:
        found = super().treatment(plan)
        return found if plan.activation_bits == FLOAT else dataclasses.replace(found, activation_grid=ASYM)

    def learned_input(self, plan: Treatment, values: int) -> LearnedInput:
        return OffsetInput(plan, values) if plan.activation_grid == ASYM else LearnedInput(plan, values)
