"""Grids of activations: which codes stand for an input, and what an input becomes on them.

`sym`: codes `-(2^(b-1)-1) .. 2^(b-1)-1`, value `scale * code`. `asym`: a whole zero point z besides, value `scale *
(code - z)`, and one code more, except at 8 bits, where the kernels' codes are -127 .. 127. Both round as the kernels
do: `x * (1 / scale)` to the nearest, then z is added, then the code is clamped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.contract import TINY
from qkernels.grids import Grid, dynamic_scales

SYM, ASYM = "sym", "asym"


def code_range(bits: int, grid: str) -> tuple[int, int]:
    """The least and the largest code of `bits` bits, 2 .. 8."""
    kind = Grid(bits, "symfull" if grid == ASYM and bits < 8 else "sym")
    return kind.low, kind.high


def static_quantizer(low: float, high: float, bits: int, grid: str) -> tuple[Tensor, Tensor | None]:
    """Scale float32 `[]` and zero point int32 `[]` (None: sym) whose codes cover `low .. high` and 0. A range of zero
    has scale 1."""
    least, most = code_range(bits, grid)
    low, high = min(low, 0.0), max(high, 0.0)
    if grid == SYM:
        top = max(high, -low)
        return torch.tensor(top / most if top >= TINY else 1.0, dtype=torch.float32), None
    scale = torch.tensor((high - low) / (most - least) if high - low >= TINY else 1.0, dtype=torch.float32)
    return scale, torch.tensor(least + round(-low / float(scale)), dtype=torch.int32).clamp(least, most)


def quantize_twin(x: Tensor, bits: int, scale: Tensor, negative: float) -> Tensor:
    """`x` on two ranges of 2^(bits-1) codes each (PTQ4ViT): from 0 up in steps of `scale`, below 0 in steps of
    `negative`. Float32."""
    y, codes = x.float(), 2 ** (bits - 1)
    above = (y * (1 / scale)).round_().clamp_(0, codes - 1) * scale
    below = (y * (1 / negative)).round_().clamp_(-codes, 0) * negative
    return torch.where(y < 0, below, above)


def quantize_dequantize(
    x: Tensor,
    bits: int,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    grid: str = SYM,
    share: float = 1.0,
) -> Tensor:
    """`x` on the grid of `bits`: dynamic per token (last axis), or with a static `scale`, and the `zero_point` that
    makes the grid asym. They broadcast with x. `share`: of a token's range that its codes cover. Float32 inside."""
    y = x.float()
    if scale is not None:
        least, most = code_range(bits, SYM if zero_point is None else ASYM)
        zero = 0.0 if zero_point is None else zero_point.float()
        return ((y * (1 / scale)).round_() + zero).clamp_(least, most).sub_(zero).mul_(scale)
    low, high = torch.aminmax(y, dim=-1, keepdim=True)
    least, most = code_range(bits, grid)
    if grid == SYM:
        if share != 1.0:
            scale, inverse = dynamic_scales(share * torch.maximum(high, -low), most)
            return (y * inverse).round_().clamp_(least, most).mul_(scale)
        scale, inverse = dynamic_scales(torch.maximum(high, -low), most)
        return (y * inverse).round_().mul_(scale)  # |y * inverse| rounds to the largest code at most
    low, high = share * low.clamp(max=0), share * high.clamp(min=0)
    scale, inverse = dynamic_scales(high - low, most - least)
    zero = least - (low * inverse).round_()
    return ((y * inverse).round_() + zero).clamp_(least, most).sub_(zero).mul_(scale)
