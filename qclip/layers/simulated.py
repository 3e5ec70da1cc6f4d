"""A linear site on the quantization grid in float arithmetic: the numbers as they would be, not the speed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.grids import Grid, dynamic_scales

from .gradients import refuse_gradients
from .site import QuantizedSite, Weight


def quantize_dequantize(x: Tensor, bits: int, scale: Tensor | None = None) -> Tensor:
    """`x` on the symmetric grid of `bits`: dynamic per token (last axis), or with a static `scale`. Float32 inside."""
    grid, y = Grid(bits, "sym"), x.float()
    if scale is not None:
        return grid.decode(grid.encode(y, scale), scale)
    low, high = torch.aminmax(y, dim=-1, keepdim=True)
    scale, inverse = dynamic_scales(torch.maximum(high, -low), grid.high)
    return (y * inverse).round_().mul_(scale)  # |y * inverse| rounds to the largest code at most


class SimulatedLinear(QuantizedSite):
    """Weight codes as in a real site (6-bit codes in an `Int8Weight`, 4-bit in an `Int4Weight`), computed in float."""

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None,
        activation_bits: int,
        smooth: Tensor | None = None,
        input_scale: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weight, bias, smooth, input_scale, dtype)
        self.activation_bits = activation_bits

    def pack(self) -> None:
        """Stays canonical: no kernel reads it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.smooth is None else x.float() * self.smooth
        if self.activation_bits < 16:
            y = quantize_dequantize(y, self.activation_bits, self.input_scale)
        y = F.linear(y.to(x.dtype), self.quantized.dequantize().to(x.dtype), self.bias)
        return refuse_gradients(y, x, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation_bits={self.activation_bits}"
