"""A linear site on the quantization grid in float arithmetic: the numbers as they would be, not the speed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.grids import Grid, dynamic_scales

from ..untrusted.schema import optional, whole
from .gradients import refuse_gradients
from .site import Description, QuantizedSite
from .transforms import transformed


def quantize_dequantize(x: Tensor, bits: int, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Tensor:
    """`x` on the symmetric grid of `bits`: dynamic per token (last axis), or with a static `scale`, whose codes a
    `zero_point` moves before they are clamped. Float32 inside."""
    grid, y = Grid(bits, "sym"), x.float()
    if scale is not None:
        zero = None if zero_point is None else zero_point.float()
        return grid.decode(grid.encode(y, scale, zero), scale, zero)
    low, high = torch.aminmax(y, dim=-1, keepdim=True)
    scale, inverse = dynamic_scales(torch.maximum(high, -low), grid.high)
    return (y * inverse).round_().mul_(scale)  # |y * inverse| rounds to the largest code at most


class SimulatedLinear(QuantizedSite):
    """Weight codes as in a real site (6-bit codes in an `Int8Weight`, 4-bit in an `Int4Weight`), computed in float.
    `activation_bits`: None leaves the input float."""

    packs = False
    SETTINGS = {"activation_bits": optional(whole(2, 8))}

    def __init__(self, *args: Any, activation_bits: int | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation_bits = activation_bits

    def describe(self) -> Description:
        return Description(self.shape, "simulated", self.grid.bits, self.activation_bits)

    def pack(self) -> None:
        """Stays canonical: no kernel reads it."""

    def forward(self, x: Tensor) -> Tensor:
        y = transformed(x, self.transforms)
        if self.activation_bits is not None:
            y = quantize_dequantize(y, self.activation_bits, self.input_scale, self.input_zero)
        y = F.linear(y.to(x.dtype), self.quantized.dequantize().to(x.dtype), self.bias)
        return refuse_gradients(y, x, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation_bits={self.activation_bits}"
