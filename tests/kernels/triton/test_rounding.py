"""The shared number rules against torch, at ties, limits, zeros, NaN and infinities."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from qkernels import reference
from qkernels.triton import rounding


@triton.jit
def _round(x, y, SMALL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    tl.store(y + at, rounding.round_small(v) if SMALL else rounding.round_half_even(v))


@triton.jit
def _rows(x, codes, scales, scale, zero_point, STATIC: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, K)
    at = rows[:, None] * K + columns[None, :]
    found, row_scales = rounding.quantize_rows(tl.load(x + at), tl.load(scale), tl.load(zero_point), STATIC)
    tl.store(codes + at, found)
    tl.store(scales + rows, row_scales)


@pytest.mark.parametrize("small", [True, False])
def test_rounding_is_half_to_even(small: bool) -> None:
    halves = torch.arange(-300, 300) / 2
    edges = torch.tensor([2.0**22 - 0.5, 2.0**22 - 1.5, 0.49999997, 1.4999999, 2.5000002])
    x = torch.cat([halves, edges, -edges])
    if not small:
        large = torch.tensor([2.0**22 + 0.5, 2.0**22 + 1.5, 2.0**23 - 0.5, 2.0**23 + 1, 3e38, math.inf, math.nan])
        x = torch.cat([x, large, -large])
    x = torch.cat([x, torch.zeros(1024 - len(x))])
    y = torch.full((1024,), math.nan)
    _round[(1,)](x, y, small, 1024)
    torch.testing.assert_close(y, torch.round(x), rtol=0, atol=0, equal_nan=True)


def rows() -> torch.Tensor:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    x[1], x[2] = 0.0, 2.0**-101
    x[3] = 2.0**-100
    x[4, 5], x[5, 6], x[6, 7] = math.nan, math.inf, -math.inf
    x[7, 0], x[7, 63] = math.nan, math.inf
    x[8] = 3e38
    x[9] = torch.arange(64) / 2 - 16  # ties
    x[9, 0] = 127
    x[10, 1:] *= 1e-30
    x[11] = -(2.0**-100) * (1 - 2.0**-24)  # the largest that counts as zero
    x[12, 1:], x[13] = -0.0, 1e-45
    return x


@pytest.mark.parametrize(
    ("scale", "zero_point"),
    [
        (None, 0.0),
        (0.5, 0.0),
        (0.013, 7.0),
        (1e-30, -130.0),
        (1e38, 3.0),
        (3.4e38, 0.0),
        (2.0**-127, 0.0),
        (2.0**-128, 0.0),
        (math.inf, 0.0),
        (0.0, 0.0),
        (-1.0, 0.0),
        (math.nan, 0.0),
    ],
)
def test_rows_follow_the_rules(scale: float | None, zero_point: float) -> None:
    x = rows()
    codes, scales = torch.full((16, 64), 77, dtype=torch.int8), torch.full((16,), 77.0)
    given = torch.tensor(1.0 if scale is None else scale)
    _rows[(1,)](x, codes, scales, given, torch.tensor(zero_point), scale is not None, 16, 64)
    static = (None, None) if scale is None else (given, torch.tensor(zero_point))
    wanted_codes, wanted_scales = reference.quantize_per_token(x, None, *static)
    assert torch.equal(codes, wanted_codes)
    torch.testing.assert_close(scales, wanted_scales, rtol=0, atol=0, equal_nan=True)
