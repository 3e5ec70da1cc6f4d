"""`layer_norm_quantize`: LayerNorm, SmoothQuant's factors and quantization in one read of x.

With `guess` the mean of a row's first chunk and `d = x - guess`: `shift = mean(d)`, `variance = mean(d^2) - shift^2`,
`y = (d - shift) * (rstd * gain) + offset`, where `gain = weight * smooth` and `offset = bias * smooth`; then the rule
of `qkernels.ops`. One reduction gives both sums. No digits are lost in the difference: for a chunk of n of the K values
`shift^2 <= (K/n - 1) * variance`, always. Nor in d where the mean is large beside the deviation, because x and guess
are then near each other; a row of one value has d = shift, and comes out exactly 0.

Bound by memory: an element costs its own 2 (or 4) bytes read and 1 written, a row 4 bytes of scale. At 4.3 TB/s, the
copy rate of an H200, bfloat16 rows take 0.70 ns for 1,000 elements, in which its processors can issue some 20
instructions an element. The code of a row of 768 has 758 for 24 elements a thread, among them slow paths of divisions
and what a program does once. Gains and offsets (8 bytes an element) would be as much work for the L1 cache as x for the
memory: a program loads them once and keeps them in registers for the rows that it goes through.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .launch import ceil_div, chip, on
from .rounding import EXACT, largest, row_absmax
from .rows import (
    RowTile,
    as_rows,
    row_case,
    row_limits,
    row_starts,
    row_stride,
    row_tile,
    rows_and_scales,
    rule,
    to_codes,
    write_rows,
)

PROGRAMS = 4  # of four warps that a multiprocessor runs at once, in 128 registers per thread


def steps_of(rows: int, tile: RowTile, multiprocessors: int) -> int:
    """How often a program takes `tile.rows` rows: 4 times where that still leaves work for every multiprocessor."""
    rounds = rows // (tile.rows * multiprocessors * PROGRAMS)
    return 4 if rounds >= 4 else 2 if rounds >= 2 else 1


@triton.jit
def _gain(weight, smooth, at, mask):
    """Columns `at` of weight * smooth, either of which may be None."""
    gain = tl.full(at.shape, 1.0, tl.float32)
    if weight is not None:
        gain = tl.load(weight + at, mask, other=0.0).to(tl.float32)
    if smooth is not None:
        gain = gain * tl.load(smooth + at, mask, other=0.0)
    return gain


@triton.jit
def _offset(bias, smooth, at, mask):
    """Columns `at` of bias * smooth, either of which may be None."""
    offset = tl.zeros(at.shape, tl.float32)
    if bias is not None:
        offset = tl.load(bias + at, mask, other=0.0).to(tl.float32)
        if smooth is not None:
            offset = offset * tl.load(smooth + at, mask, other=0.0)
    return offset


@triton.jit
def _shift_and_rstd(total, squares, eps, K: tl.constexpr):
    """Sums over rows of d and d^2 -> mean of d, and 1 / sqrt(variance + eps), NaN where squares overflowed. Divided,
    not multiplied by 1 / K: K equal values have their value for a mean."""
    shift = tl.div_rn(total, K * 1.0)
    variance = tl.maximum(tl.div_rn(squares, K * 1.0) - shift * shift, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return shift, tl.where(squares < float("inf"), rstd, float("nan"))


@triton.jit
def _normalize(x, gains, offsets, mask_last, eps, K: tl.constexpr, WIDTH: tl.constexpr):
    """Rows as a tuple of float32 chunks, 0 beyond K -> their y, 0 beyond K."""
    guess = (tl.sum(x[0], 1) * (1.0 / min(K, WIDTH)))[:, None]
    centred = ()
    sums, squares = tl.zeros(x[0].shape, tl.float32), tl.zeros(x[0].shape, tl.float32)
    for start in tl.static_range(0, K, WIDTH):
        d = x[start // WIDTH] - guess
        if start + WIDTH > K:
            d = tl.where(mask_last, d, 0.0)
        centred = centred + (d,)
        sums += d
        squares = tl.fma(d, d, squares)
    shift, rstd = _shift_and_rstd(tl.sum(sums, 1), tl.sum(squares, 1), eps, K)
    result = ()
    for start in tl.static_range(0, K, WIDTH):
        c = centred[start // WIDTH] - shift[:, None]
        y = tl.fma(c, rstd[:, None] * gains[start // WIDTH], offsets[start // WIDTH])
        if start + WIDTH > K:
            y = tl.where(mask_last, y, 0.0)
        result = result + (y,)
    return result


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    x,
    weight,
    bias,
    smooth,
    scale,
    zero_point,
    codes,
    scales,
    rows,
    stride,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    columns = tl.arange(0, WIDTH)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    gains, offsets = (), ()
    for start in tl.static_range(0, K, WIDTH):
        at = start + columns
        gains = gains + (_gain(weight, smooth, at, at < K),)
        offsets = offsets + (_offset(bias, smooth, at, at < K),)
    mask_last = columns + (K - 1) // WIDTH * WIDTH < K
    for step in range(STEPS):
        row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        live = row < rows
        source = row_starts(x, row, stride, K)[:, None]
        chunks = ()
        for start in tl.static_range(0, K, WIDTH):
            at = start + columns
            chunks = chunks + (tl.load(source + at, live[:, None] & (at < K), other=0.0).to(tl.float32),)
        y = _normalize(chunks, gains, offsets, mask_last, eps, K, WIDTH)
        write_rows(y, row, live, scale, zero_point, codes, scales, K, WIDTH)


@triton.jit
def wide_rows_kernel(
    x,
    weight,
    bias,
    smooth,
    scale,
    zero_point,
    codes,
    scales,
    stride,
    eps,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) + tl.arange(0, 1)
    source, target = row_starts(x, row, stride, K)[:, None], row_starts(codes, row, None, K)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    guess = (tl.sum(tl.load(source + columns).to(tl.float32), 1) * (1.0 / WIDTH))[:, None]
    sums, squares = tl.zeros([1, WIDTH], tl.float32), tl.zeros([1, WIDTH], tl.float32)
    for start in range(0, K, WIDTH):
        at = start + columns
        d = tl.where(at < K, tl.load(source + at, at < K, other=0.0).to(tl.float32) - guess, 0.0)
        sums += d
        squares = tl.fma(d, d, squares)
    shift, rstd = _shift_and_rstd(tl.sum(sums, 1), tl.sum(squares, 1), eps, K)
    shift, rstd = shift[:, None], rstd[:, None]
    most = tl.zeros([1, WIDTH], tl.float32)
    for start in range(0, K, WIDTH):
        at = start + columns
        c = tl.load(source + at, at < K, other=0.0).to(tl.float32) - guess - shift
        y = tl.fma(c, rstd * _gain(weight, smooth, at, at < K), _offset(bias, smooth, at, at < K))
        most = largest(most, tl.where(at < K, tl.abs(y), 0.0))
    found, inverse, good = rule(row_absmax(most, 1), scale)
    tl.store(scales + row, found)
    for start in range(0, K, WIDTH):
        at = start + columns
        c = tl.load(source + at, at < K, other=0.0).to(tl.float32) - guess - shift
        y = tl.fma(c, rstd * _gain(weight, smooth, at, at < K), _offset(bias, smooth, at, at < K))
        tl.store(target + at, to_codes(y, inverse, good, scale, zero_point), at < K)


layer_norm_quantize_limits = row_limits


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    smooth: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.layer_norm_quantize`. Rows that are not contiguous are copied first. A row whose sum of squares
    leaves float32 comes out NaN."""
    k = x.shape[-1]
    codes, scales = out = rows_and_scales(x.shape[:-1], k, x.device) if out is None else out
    x = as_rows(x)
    if not len(x):
        return out
    tile = row_tile(k, x.dtype)
    given = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "smooth": smooth,
        "scale": scale,
        "zero_point": zero_point,
        "codes": codes,
        "scales": scales,
        "stride": row_stride(x),
        "eps": eps,
        "K": k,
        "WIDTH": tile.width,
        "num_warps": tile.warps,
        **EXACT,
    }
    with on(x):
        if tile.looped:
            wide_rows_kernel[(len(x),)](**given)
        else:
            steps = steps_of(len(x), tile, chip(x.device).multiprocessors)
            grid = (ceil_div(len(x), tile.rows * steps),)
            rows_kernel[grid](**given, rows=len(x), ROWS=tile.rows, STEPS=steps)
    return out


def aot_cases() -> list[AotCase]:
    """Widths of CLIP's towers; one to eight warps per row; the loop; each rule; with and without the vectors."""
    dynamic = ("scale", "zero_point", "stride")
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    shapes = ((bf16, 768), (fp16, 1024), (bf16, 1280), (fp32, 768), (bf16, 2048), (bf16, 5120), (fp32, 8192))
    four, one = {"STEPS": 4}, {"STEPS": 1}
    cases = [row_case("layer_norm", rows_kernel, k, dtype, dynamic, constants=four) for dtype, k in shapes]
    bare = ("weight", "bias", "smooth", "stride")
    cases.append(row_case("layer_norm-bare-zero-point", rows_kernel, 768, bf16, bare, constants=one))
    static = ("smooth", "zero_point")
    cases.append(row_case("layer_norm-static-strided", rows_kernel, 1024, bf16, static, constants=one))
    cases.append(row_case("layer_norm-strided", rows_kernel, 1024, bf16, dynamic[:2], aligned=False, constants=four))
    vectors = ("LDG.E.128", "STG.E.128")
    cases.append(row_case("layer_norm-wide", wide_rows_kernel, 16384, bf16, dynamic, contains=vectors))
    return cases
