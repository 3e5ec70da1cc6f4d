"""The noise arm, a control of trained recipes: what rounding adds, as noise that knows nothing of the values.

Weights and inputs get uniform noise where a quantizer would round them, as wide as a step of the grid that calibration
finds before training, U(-s/2, s/2). `noise-measured` gives it the mean square that the rounding error has there, what
is clipped included. It is drawn anew in each step, and there is none in eval mode: what is deployed is a float model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layers.activations import ASYM, code_range, quantize_dequantize
from ...ptq.base import quantize_weight
from ...recipes import Treatment
from ..quantizer import InputRounding, Rounding, WeightRounding, fitted_scales
from .continued import Continued, FloatWeight
from .lsq import LSQ


def width_of(mean_square: Tensor) -> Tensor:
    """Of the uniform distribution around 0 with that mean square."""
    return (3 * mean_square).sqrt()


def noisy(rounding: Rounding, x: Tensor, width: Tensor) -> Tensor:
    """x and, in training, noise from U(-width, width): the same for the same `rounding.number`, without one torch's own
    random numbers."""
    if not rounding.training:
        return x
    generator = None if rounding.number is None else torch.Generator(x.device).manual_seed(rounding.number)
    drawn = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    return x + (drawn.mul_(2).sub_(1) * width).to(x.dtype)


class NoisyWeight(FloatWeight):
    width: Tensor  # float32 [N, 1], or [N, groups]

    def __init__(self, weight: Tensor, plan: Treatment, measured: bool) -> None:
        super().__init__(weight, plan)
        self.measured = measured
        groups = 1 if measured else -(-weight.shape[1] // self.group)
        self.register_buffer("width", torch.zeros(weight.shape[0], groups, device=weight.device))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        if self.measured:
            error = quantize_weight(weight, self.plan).dequantize() - weight
            self.width.copy_(width_of(error.square().mean(1, keepdim=True)))
        else:
            self.width.copy_(fitted_scales(weight, self.plan).abs() / 2)

    def forward(self, weight: Tensor) -> Tensor:
        wide = self.width if self.width.shape[1] == 1 else self.width.repeat_interleave(self.group, 1)
        return noisy(self, weight, wide[:, : weight.shape[1]])


class NoisyInput(InputRounding):
    """Of a static input: noise of one width for the tensor."""

    width: Tensor  # float32 []

    def __init__(self, plan: Treatment, measured: bool) -> None:
        super().__init__(plan)
        self.watches = measured
        self.register_buffer("width", torch.zeros(()))

    @torch.no_grad()
    def start(self, scale: Tensor, zero: Tensor | None) -> None:
        self.width.copy_(scale.abs() / 2)
        self.grid, self.squares, self.count = (scale, zero), 0.0, 0

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        error = quantize_dequantize(x, self.plan.activation_bits, *self.grid) - x
        self.squares += float(error.double().square().sum())
        self.count += x.numel()
        self.width.copy_(width_of(torch.tensor(self.squares / max(self.count, 1))))

    def forward(self, x: Tensor) -> Tensor:
        return noisy(self, x, self.width)


class NoisyToken(InputRounding):
    """Of a dynamic input: as wide as a step of each token's own grid, which clips nothing."""

    def forward(self, x: Tensor) -> Tensor:
        low, high = torch.aminmax(x.detach(), dim=-1, keepdim=True)
        least, most = code_range(self.plan.activation_bits, self.plan.activation_grid)
        if self.plan.activation_grid == ASYM:
            step = (high.clamp(min=0) - low.clamp(max=0)) / (most - least)
        else:
            step = torch.maximum(high, -low) / most
        return noisy(self, x, step / 2)


class Noise(Continued):
    """Uniform noise as wide as a step where a quantizer rounds, none when deployed: a control"""

    name = "noise"
    measured = False

    @classmethod
    def treatment(cls, plan: Treatment) -> Treatment:
        return LSQ.treatment(plan)

    def weight(self, weight: Tensor, plan: Treatment) -> WeightRounding:
        return NoisyWeight(weight, plan, self.measured)

    def input(self, plan: Treatment, values: int) -> InputRounding:
        return NoisyInput(plan, self.measured) if plan.static else NoisyToken(plan)


class MeasuredNoise(Noise):
    """Noise of the mean square that the rounding error has at each site, clipping included: a control"""

    name = "noise-measured"
    measured = True
