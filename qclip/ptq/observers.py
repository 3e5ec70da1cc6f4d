"""Scales of weights: which range of a group's values the codes cover (methods 2.1, observers).

Min-max covers all of it. `least_squares_scales` covers less where that costs less: a large value that is clipped lets
the others be rounded more finely. No data is needed, the codes and kernels are the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.weights import SMALLEST_NORMAL_HALF, TINY

RANGES = 80  # shrunk ranges that are tried: 1 - i/100 of the one that clips nothing
_AT_ONCE = 1 << 16  # values of a chunk of rows, so that its temporaries stay in the cache


@torch.no_grad()
def least_squares_scales(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Scales of least squared rounding error for float32 `[N, K]`: float32 `[N, ceil(K/group)]`, `group=None` = K.

    Tried are the min-max scale and 80 ranges, `(1 - i/100) * amax / (2^(b-1) - 1)`; the first of the best is taken, so
    that no group is worse than by min-max. At 4 bits and below, where the grid has one more negative code, also their
    negatives: a negative scale turns the grid around. 4-bit scales are tried as the float16 numbers that are stored,
    and codes are those of `Int4Weight.quantize` and `Int8Weight.quantize`. A group of zeros has scale 1, one whose
    range float16 cannot hold at 4 bits Inf.
    """
    n, k = weight.shape
    group = k if group is None else min(group, k)
    grouped = F.pad(weight.detach().float(), (0, -k % group)).view(n, -1, group)  # zeros round to zeros: no error
    rows = max(1, _AT_ONCE // (grouped.shape[1] * group))
    return torch.cat([_search(chunk, bits) for chunk in grouped.split(rows)])


def _search(x: Tensor, bits: int) -> Tensor:
    """`[n, groups, group]` -> `[n, groups]`."""
    top = 2 ** (bits - 1) - 1
    bottom, steps = (-top - 1, top + 0.5) if bits <= 4 else (-top, float(top))
    absmax = x.abs().amax(2)
    tried = [absmax / steps, *((1 - i / 100) * absmax / top for i in range(RANGES))]
    best, least = torch.ones_like(absmax), torch.full_like(absmax, torch.inf)
    codes, off = torch.empty_like(x), torch.empty_like(x)
    for sign in (1, -1) if bits <= 4 else (1,):
        for scale in tried:
            if bits == 4:
                scale = scale.clamp(min=SMALLEST_NORMAL_HALF).half().float()
            scale = scale * sign
            torch.mul(x, (1 / scale)[:, :, None], out=codes).round_().clamp_(bottom, top)
            torch.mul(codes, scale[:, :, None], out=off).sub_(x)
            error = off.square_().sum(2)
            better = error < least  # never where it is NaN: a scale of zero, or beyond float16
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    if bits == 4:  # beyond float16 without clipping: no scale, which `Int4Weight.quantize` refuses as by min-max
        best = torch.where(tried[0].half().isinf(), torch.inf, best)
    return torch.where(absmax < TINY, torch.ones_like(best), best)
