"""`quantize_per_token` and `quantize_patches`: a row's largest magnitude, then its codes, in one pass.

`y = float(x) * smooth`, `inverse = 127 / max |y|`, `code = rne(y * inverse)`; see `qkernels.ops` for the rules. Patches
are rows whose columns lie in several lines of an image, which is read in place.

Bound by memory: an element costs its own 2 (or 4) bytes read and 1 written, a row 4 bytes of scale; smooth stays in the
cache. At 4.3 TB/s, the copy rate of an H200, bfloat16 rows take 0.70 ns for 1,000 elements, in which its processors can
issue some 20 instructions an element. The code of a row of 768 has 402 for 24 elements a thread, slow paths of the two
divisions included, and no conversion to integers: a code is the low byte of `y * inverse + 1.5 * 2^23`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .launch import ceil_div, on, uncountable
from .rounding import EXACT, largest, row_absmax
from .rows import (
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


@triton.jit
def _smoothed(pointers, smooth, at, mask):
    """Values as float32, times smooth (columns `at`) where there is one; 0 where masked."""
    y = tl.load(pointers, mask, other=0.0).to(tl.float32)
    if smooth is not None:
        y = y * tl.load(smooth + at, mask, other=0.0)
    return y


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    x, smooth, scale, zero_point, codes, scales, rows, stride, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    at = tl.arange(0, WIDTH)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    source = row_starts(x, row, stride, K)[:, None]
    chunks = ()
    for start in tl.static_range(0, K, WIDTH):
        mask = live[:, None] & (start + at < K)
        chunks = chunks + (_smoothed(source + (start + at), smooth, start + at, mask),)
    write_rows(chunks, row, live, scale, zero_point, codes, scales, K, WIDTH)


@triton.jit
def wide_rows_kernel(x, smooth, scale, zero_point, codes, scales, stride, K: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) + tl.arange(0, 1)
    source, target = row_starts(x, row, stride, K)[:, None], row_starts(codes, row, None, K)[:, None]
    most = tl.zeros([1, WIDTH], tl.float32)
    for start in range(0, K, WIDTH):
        at = start + tl.arange(0, WIDTH)[None, :]
        most = largest(most, tl.abs(_smoothed(source + at, smooth, at, at < K)))
    found, inverse, good = rule(row_absmax(most, 1), scale)
    tl.store(scales + row, found)
    for start in range(0, K, WIDTH):
        at = start + tl.arange(0, WIDTH)[None, :]
        y = _smoothed(source + at, smooth, at, at < K)
        tl.store(target + at, to_codes(y, inverse, good, scale, zero_point), at < K)


@triton.jit(do_not_specialize=["rows", "across", "patches"])
def patches_kernel(
    x,
    smooth,
    scale,
    zero_point,
    codes,
    scales,
    rows,
    across,
    patches,
    by_image,
    by_channel,
    by_line,
    by_column,
    HEIGHT: tl.constexpr,
    BREADTH: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    inside = row % patches
    corner = (row // patches).to(tl.int64) * by_image
    corner += (inside // across) * (HEIGHT * by_line) + (inside % across) * (BREADTH * by_column)
    source = x + corner[:, None]
    columns = tl.arange(0, WIDTH)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    chunks = ()
    for start in tl.static_range(0, K, WIDTH):
        at = start + columns
        offset = at // (HEIGHT * BREADTH) * by_channel + at // BREADTH % HEIGHT * by_line + at % BREADTH * by_column
        mask = live[:, None] & (at < K)
        chunks = chunks + (_smoothed(source + offset, smooth, at, mask),)
    write_rows(chunks, row, live, scale, zero_point, codes, scales, K, WIDTH)


quantize_per_token_limits = row_limits


def quantize_per_token(
    x: Tensor,
    smooth: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.quantize_per_token`. Rows that are not contiguous are copied first."""
    k = x.shape[-1]
    codes, scales = out = rows_and_scales(x.shape[:-1], k, x.device) if out is None else out
    x = as_rows(x)
    if not len(x):
        return out
    tile = row_tile(k, x.dtype)
    given = {
        "x": x,
        "smooth": smooth,
        "scale": scale,
        "zero_point": zero_point,
        "codes": codes,
        "scales": scales,
        "stride": row_stride(x),
        "K": k,
        "WIDTH": tile.width,
        "num_warps": tile.warps,
        **EXACT,
    }
    with on(x):
        if tile.looped:
            wide_rows_kernel[(len(x),)](**given)
        else:
            rows_kernel[(ceil_div(len(x), tile.rows),)](**given, rows=len(x), ROWS=tile.rows)
    return out


def quantize_patches_limits(x: Tensor, height: int, width: int, *_: Any, **__: Any) -> str | None:
    """What the kernel cannot take, worded to follow "the triton backend"."""
    batch, channels, lines, columns = x.shape
    patches = batch * (lines // height) * (columns // width)
    return uncountable({"patches": patches, "the values of an image": channels * lines * columns})


def quantize_patches(
    x: Tensor,
    height: int,
    width: int,
    smooth: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.quantize_patches`. Images are read in place, whatever their strides; only patches of more
    values than registers hold are copied first."""
    batch, channels, lines, columns = x.shape
    down, across, k = lines // height, columns // width, channels * height * width
    tile = row_tile(k, x.dtype)
    if tile.looped:
        cut = x[:, :, : down * height, : across * width].unfold(2, height, height).unfold(3, width, width)
        patches = cut.permute(0, 2, 3, 1, 4, 5).reshape(batch, down * across, k)
        return quantize_per_token(patches, smooth, scale, zero_point, out=out)
    codes, scales = out = rows_and_scales((batch, down * across), k, x.device) if out is None else out
    rows = batch * down * across
    if not rows:
        return out
    if sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31:
        x = x.contiguous()  # offsets within an image are int32
    with on(x):
        patches_kernel[(ceil_div(rows, tile.rows),)](
            x=x,
            smooth=smooth,
            scale=scale,
            zero_point=zero_point,
            codes=codes,
            scales=scales,
            rows=rows,
            across=across,
            patches=down * across,
            by_image=x.stride(0),
            by_channel=x.stride(1),
            by_line=x.stride(2),
            by_column=x.stride(3),
            HEIGHT=height,
            BREADTH=width,
            K=k,
            ROWS=tile.rows,
            WIDTH=tile.width,
            num_warps=tile.warps,
            **EXACT,
        )
    return out


def aot_cases() -> list[AotCase]:
    """Widths of CLIP's towers; one, two, four and eight warps per row; the loop; each rule; each input type."""
    dynamic, static = ("scale", "zero_point", "stride"), ("smooth", "zero_point", "stride")
    bf16, fp32 = torch.bfloat16, torch.float32
    shapes = ((bf16, 768), (torch.float16, 1024), (fp32, 768), (bf16, 2048), (bf16, 3072), (bf16, 8192), (fp32, 8192))
    cases = [row_case("quantize", rows_kernel, k, dtype, dynamic) for dtype, k in shapes]
    cases.append(row_case("quantize-static", rows_kernel, 768, bf16, static))
    cases.append(row_case("quantize-zero-point-strided", rows_kernel, 768, bf16))
    cases.append(row_case("quantize-strided", rows_kernel, 1024, bf16, dynamic[:2], aligned=False))
    cases.append(row_case("quantize-odd", rows_kernel, 769, bf16, dynamic, aligned=False))
    cases.append(row_case("quantize-wide", wide_rows_kernel, 16384, bf16, dynamic, contains=("LDG.E.128", "STG.E.128")))
    whole = ("scale", "zero_point", "smooth", "by_column")
    for dtype, size, vectors in ((bf16, 32, ("LDG.E.128", "STG.E.64")), (fp32, 14, ("LDG.E.64", "STG.E.64"))):
        sizes = {"HEIGHT": size, "BREADTH": size, "by_column": 1}
        k = 3 * size**2
        cases.append(row_case("quantize-patches", patches_kernel, k, dtype, whole, contains=vectors, constants=sizes))
    sizes = {"HEIGHT": 16, "BREADTH": 16}
    cases.append(row_case("quantize-patches", patches_kernel, 768, bf16, whole[:2], aligned=False, constants=sizes))
    return cases
