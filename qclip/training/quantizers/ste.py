"""The plain straight-through estimator (Bengio et al. 2013, arXiv 1308.3432): the floor that other quantizers start
from.

Scales follow from the data of each call and are not learned: those of a weight by the plan's observer, those of an
input from each token, or static ones as calibration found them.
"""

from __future__ import annotations

import torch
from torch import Tensor

import qkernels
from qkernels.weights import Weight

from ...layers.activations import ASYM, SYM, code_range, quantize_dequantize
from ...ptq.base import SiteState, quantize_weight
from ...recipes import Treatment
from ..quantizer import InputRounding, Quantizer, WeightRounding, straight_through


class FittedWeight(WeightRounding):
    """Scales of the weight as it is; the gradient passes unchanged, as no scale clips by more than half a step."""

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, self.quantized(weight).dequantize())

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> Weight:
        return quantize_weight(weight, self.plan)


class DynamicInput(InputRounding):
    """A scale for each token, from its own largest value; the gradient passes unchanged, as nothing is clipped."""

    def forward(self, x: Tensor) -> Tensor:
        bits, grid = self.plan.activation_bits, self.plan.activation_grid
        return straight_through(x, quantize_dequantize(x.detach(), bits, grid=grid).to(x.dtype))


class StaticInput(InputRounding):
    """A scale for the tensor, and a zero point where the plan wants one, as calibration found them; the gradient is 0
    where a value is clipped."""

    scale: Tensor
    zero: Tensor

    def __init__(self, plan: Treatment) -> None:
        super().__init__(plan)
        self.low, self.high = code_range(plan.activation_bits, plan.activation_grid)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int32))

    @torch.no_grad()
    def start(self, scale: Tensor, zero: Tensor | None) -> None:
        self.scale.copy_(scale)
        self.zero.copy_(torch.zeros(()) if zero is None else zero)

    def forward(self, x: Tensor) -> Tensor:
        return qkernels.fake_quantize(x, self.scale, self.zero, self.low, self.high, "ste")

    def decide(self, state: SiteState, width: int) -> None:
        decide_static(state, self.plan, self.scale, self.zero)


def decide_static(state: SiteState, plan: Treatment, scale: Tensor, zero: Tensor) -> None:
    """The static scale, and the zero point where the plan has one, of a site's input."""
    state.input_scale = scale.detach().float().clone()
    state.input_zero = zero.detach().to(torch.int32).clone() if plan.activation_grid == ASYM else None


class STE(Quantizer):
    """Scales from the data of each call, gradients straight through the rounding"""

    name = "ste"

    def weight(self, weight: Tensor, plan: Treatment) -> WeightRounding:
        return FittedWeight(weight, plan)

    def input(self, plan: Treatment, values: int) -> InputRounding:
        return self.static_input(plan, values) if plan.static else DynamicInput(plan)

    def static_input(self, plan: Treatment, values: int) -> InputRounding:
        return StaticInput(plan)


__all__ = ["ASYM", "STE", "SYM", "DynamicInput", "FittedWeight", "StaticInput", "decide_static"]
