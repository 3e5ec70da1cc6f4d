"""LSQ (Esser et al. 2019, arXiv 1902.08153), its scales learned as logarithms and started where the squared error is
least: the paper's own start, `2 mean |w| / sqrt(Qp)`, is far off at 8 bits (docs/methods.md, Quantizers of training).
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

import qkernels
from qkernels.contract import SMALLEST_NORMAL_HALF
from qkernels.weights import Weight, grid_scales, levels

from ...errors import RecipeError
from ...layers.activations import code_range
from ...ptq.base import SiteState
from ...recipes import FLOAT, Treatment
from ..quantizer import InputRounding, LearnedScale, WeightRounding, fitted_scales, straight_through
from . import starts
from .ste import ASYM, STE, SYM, decide_static

INNER = 0.45  # steps from its code at which a weight may begin: half a step would be the next code's


class LearnedWeight(WeightRounding):
    """A learned scale for each group, channel, or for the whole weight."""

    ESTIMATORS: ClassVar[tuple[str, str]] = ("lsq", "lsq_plus")  # of grids with a whole zero, and of midrise ones
    delta: float = 0.0
    paper: starts.Start | None = None  # where scales start; None: at the least squared error

    def __init__(self, weight: Tensor, plan: Treatment) -> None:
        super().__init__(weight, plan)
        if self.grid.zero is None:
            raise RecipeError(
                f"training learns scales, not the zeros of {self.grid}; set weight_grid 'sym', 'symfull' or 'midrise'"
            )
        self.zero = float(self.grid.zero)
        groups = -(-weight.shape[1] // self.group)
        self.shape = (weight.shape[0], groups)
        self.learned = LearnedScale(*((1, 1) if plan.weight_scale == "tensor" else self.shape))
        self.as_half = self.grid.container == "Int4Weight"  # which holds scales as float16
        self.step = 1 / math.sqrt(self.group * max(self.grid.high, 1))  # of the scale's gradient

    def start(self, weight: Tensor) -> None:
        whole = self.plan.weight_scale == "tensor"
        if self.paper is None:
            scales = fitted_scales(weight, self.plan)
            self.learned.start(scales[:1] if whole else scales)
        else:
            rows, group = (weight.reshape(1, -1), weight.numel()) if whole else (weight, self.group)
            spread = starts.spread_of(rows, group, self.grid.low, self.grid.high, self.zero)
            self.learned.start(starts.scales(self.paper, spread))

    @torch.no_grad()
    def start_at(self, weight: Tensor, found: Weight) -> Tensor:
        scales, grid = grid_scales(found, self.grid), self.grid
        self.learned.start(scales[:1] if self.plan.weight_scale == "tensor" else scales)
        steps = scales.repeat_interleave(self.group, dim=1)[:, : weight.shape[1]]
        codes = levels(found, grid).float() + grid.low
        off = weight / steps + self.zero - codes
        return (codes - self.zero + off.clamp(-INNER, INNER)) * steps

    def scales(self, weight: Tensor) -> Tensor:
        scales = self.learned().expand(self.shape)
        if self.as_half:
            held = scales.detach().abs().clamp(min=SMALLEST_NORMAL_HALF).half().float() * scales.detach().sign()
            scales = straight_through(scales, held)
        return scales

    def forward(self, weight: Tensor) -> Tensor:
        scales, grid = self.scales(weight), self.grid
        plain, offset = self.ESTIMATORS
        zero = None if self.zero == 0 else scales * -self.zero
        estimator = plain if zero is None else offset
        return qkernels.fake_quantize(
            weight,
            scales,
            zero,
            grid.low,
            grid.high,
            estimator,
            group=self.group,
            grad_scale=self.step,
            delta=self.delta,
        )

    def fault(self) -> str:
        return self.learned.fault()


class LearnedInput(InputRounding):
    """A learned scale for the tensor; its zero point stays as calibration found it."""

    ESTIMATOR: ClassVar[str] = "lsq"
    zero: Tensor
    paper: starts.Start | None = None  # where the scale starts; None: where calibration found it

    def __init__(self, plan: Treatment, values: int) -> None:
        super().__init__(plan)
        self.seen = starts.Seen()
        self.low, self.high = code_range(plan.activation_bits, plan.activation_grid)
        self.learned = LearnedScale()
        self.register_buffer("zero", torch.zeros((), dtype=torch.int32))
        self.step = 1 / math.sqrt(values * self.high)

    @torch.no_grad()
    def start(self, scale: Tensor, zero: Tensor | None) -> None:
        self.learned.start(scale)
        self.zero.copy_(torch.zeros(()) if zero is None else zero)
        self.seen = starts.Seen()

    def watch(self, x: Tensor) -> None:
        assert self.paper is not None
        self.seen.add(x)
        self.learned.start(starts.scales(self.paper, self.seen.spread(self.low, self.high, float(self.zero))))

    def forward(self, x: Tensor) -> Tensor:
        return qkernels.fake_quantize(
            x, self.learned(), self.zero, self.low, self.high, self.ESTIMATOR, grad_scale=self.step
        )

    def decide(self, state: SiteState, width: int) -> None:
        decide_static(state, self.plan, self.learned(), self.zero)

    def fault(self) -> str:
        return self.learned.fault()


class LSQ(STE):
    """Learned scales of weights and static inputs, started at the least squared error"""

    name = "lsq"
    from_codes = True
    options: ClassVar[type] = starts.Options
    chosen: starts.Options
    paper: ClassVar[starts.Paper] = starts.Paper(starts.lsq, starts.lsq)

    @classmethod
    def treatment(cls, plan: Treatment) -> Treatment:
        """Static inputs; below 8 bits with a zero point, since no kernel runs them anyway."""
        bits = plan.activation_bits
        grid = ASYM if bits < 8 else SYM
        return dataclasses.replace(plan, static=bits != FLOAT, weight_observer="mse", activation_grid=grid)

    def weight(self, weight: Tensor, plan: Treatment) -> WeightRounding:
        rounding = self.learned_weight(weight, plan)
        rounding.paper = self._wanted(self.paper.weight)
        return rounding

    def static_input(self, plan: Treatment, values: int) -> InputRounding:
        rounding = self.learned_input(plan, values)
        rounding.paper = self._wanted(self.paper.input)
        rounding.watches = rounding.paper is not None
        return rounding

    def learned_weight(self, weight: Tensor, plan: Treatment) -> LearnedWeight:
        return LearnedWeight(weight, plan)

    def learned_input(self, plan: Treatment, values: int) -> LearnedInput:
        return LearnedInput(plan, values)

    def _wanted(self, start: starts.Start | None) -> starts.Start | None:
        """The paper's, where the recipe asks for it."""
        return start if start is not None and self.chosen.scale_start == "paper" else None
