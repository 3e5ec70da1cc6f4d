"""What the kernels that quantize rows share: how rows lie on the threads, and how their codes are written.

A row that fits into registers is a tuple of *chunks*, tiles `[ROWS, WIDTH]` of which every thread holds one vector: one
16-byte load of 16-bit input (or of four float32), and one store of 8 (or 4) packed codes. A row belongs to as few warps
as hold it in at most 40 values per thread: up to 1280 values to one warp, which then reduces by shuffles alone, without
shared memory or a barrier. Widths are compile-time constants (models have few), so that the chunks of 768 are three
of 256, not one of 1024 with a quarter masked off. Rows wider than 10,240 are read once a pass instead, in a loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .launch import ceil_div, uncountable
from .rounding import EXACT, dynamic_codes, dynamic_scale, is_finite, largest, row_absmax, static_codes, static_scale

MOST_VALUES = 40  # float32 values of a row that a thread holds: with weight and bias of a LayerNorm 120 registers
MOST_WARPS = 8  # that share a row
PROGRAM_WARPS = 4
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class RowTile:
    """A program of `warps` warps takes `rows` rows, in chunks of `width` columns; `looped` where a row does not fit."""

    warps: int
    rows: int
    width: int
    looped: bool


def row_tile(k: int, dtype: torch.dtype) -> RowTile:
    """The tile for rows of k values of a float dtype. The vector of a thread never is wider than the largest power of
    two that divides k: rows of codes lie end to end, so that is how they are aligned."""
    vector = min(16 // dtype.itemsize, k & -k)
    for warps in (1, 2, 4, MOST_WARPS):
        width = 32 * warps * vector
        if ceil_div(k, width) * vector <= MOST_VALUES:
            return RowTile(max(warps, PROGRAM_WARPS), max(1, PROGRAM_WARPS // warps), width, False)
    return RowTile(MOST_WARPS, 1, 32 * MOST_WARPS * 16, True)


def row_limits(x: Tensor, *_: Any, **__: Any) -> str | None:
    """What no kernel on rows `[..., K]` takes, worded to follow "the triton backend"."""
    return uncountable({"rows": x.numel() // x.shape[-1], "the values of a row": x.shape[-1]})


def as_rows(x: Tensor) -> Tensor:
    """`[..., K]` -> `[M, K]` with neighbouring columns; copied only where that is no view of x."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def row_stride(x: Tensor) -> int | None:
    """Elements from row to row; None, a compile-time K, where rows lie end to end."""
    return None if x.stride(0) == x.shape[1] or len(x) < 2 else x.stride(0)


def rows_and_scales(lead: tuple[int, ...], k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for codes `[*lead, k]` and scales `[*lead]`."""
    return (
        torch.empty(*lead, k, dtype=torch.int8, device=device),
        torch.empty(lead, dtype=torch.float32, device=device),
    )


def row_case(
    name: str,
    kernel: Any,
    k: int,
    dtype: torch.dtype,
    absent: tuple[str, ...] = (),
    aligned: bool = True,
    contains: tuple[str, ...] = ("LDG.E.128", "STG.E.64"),
    constants: dict[str, int] | None = None,
) -> AotCase:
    """A kernel on rows of k values as it is launched: without the optional arguments `absent`, with all pointers and
    strides multiples of 16, or none. `constants`: further compile-time ones. `contains` is for 16-bit input; float32
    codes leave four a store."""
    tile = row_tile(k, dtype)
    known = {"K": k, "ROWS": tile.rows, "WIDTH": tile.width, **dict.fromkeys(absent), **(constants or {})}
    constexprs = {key: value for key, value in known.items() if key in kernel.arg_names}
    types = {"x": POINTERS[dtype], "codes": "*i8", "eps": "fp32"}
    types |= {"weight": types["x"], "bias": types["x"]}
    types |= dict.fromkeys(("smooth", "scale", "zero_point", "scales"), "*fp32")
    signature = {key: types.get(key, "i32") for key in kernel.arg_names if key not in constexprs}
    always = {"eps", "rows", "steps", "across", "patches"}  # are not specialized
    if dtype == torch.float32:
        contains = tuple(word.replace("STG.E.64", "STG.E ") for word in contains)
    return AotCase(
        f"{name}-{str(dtype).removeprefix('torch.')}-{k}{'' if aligned else '-unaligned'}",
        kernel,
        signature,
        constexprs,
        tuple(key for key in signature if key not in always) if aligned else (),
        {"num_warps": tile.warps, **EXACT},
        dict.fromkeys((80, 90), contains if aligned else ()),
        ("STG.E.U8", "LDG.E.U8", "LDG.E.U16") if aligned else (),
    )


@triton.jit
def row_starts(base, row, stride, K: tl.constexpr):
    """Pointers to the starts of rows, in 64 bits."""
    if stride is None:
        return base + row.to(tl.int64) * K
    else:
        return base + row.to(tl.int64) * stride


@triton.jit
def rule(absmax, scale):
    """Largest magnitudes of rows `[ROWS]`, and a pointer to the static scale or None -> (scales, inverse, good),
    each `[ROWS]`."""
    if scale is None:
        scales, inverse, good = dynamic_scale(absmax)
        return scales, inverse, good
    else:
        given = tl.broadcast_to(tl.load(scale), absmax.shape)
        inverse, usable = static_scale(given)
        good = is_finite(absmax) & usable
        return tl.where(good, given, float("nan")), inverse, good


@triton.jit
def to_codes(y, inverse, good, scale, zero_point):
    """Float32 values `[ROWS, WIDTH]` -> int8 codes, 0 where not good. `scale` and `zero_point` are pointers or None."""
    inverse, good = inverse[:, None], good[:, None]
    if scale is None:
        return dynamic_codes(y, inverse, good)
    elif zero_point is None:
        return static_codes(y, inverse, None, good)
    else:
        return static_codes(y, inverse, tl.load(zero_point), good)


@triton.jit
def write_rows(chunks, row, live, scale, zero_point, codes, scales, K: tl.constexpr, WIDTH: tl.constexpr):
    """Quantize rows held as a tuple of float32 chunks `[ROWS, WIDTH]` (0 beyond K), and write what is `live`."""
    most = tl.abs(chunks[0])
    for start in tl.static_range(WIDTH, K, WIDTH):
        most = largest(most, tl.abs(chunks[start // WIDTH]))
    found, inverse, good = rule(row_absmax(most, 1), scale)
    at = tl.arange(0, WIDTH)[None, :]
    target = row_starts(codes, row, None, K)[:, None]
    for start in tl.static_range(0, K, WIDTH):
        written = to_codes(chunks[start // WIDTH], inverse, good, scale, zero_point)
        tl.store(target + (start + at), written, live[:, None] & (start + at < K))
    tl.store(scales + row, found, live)  # last: it takes a barrier to collect the scales of several warps
