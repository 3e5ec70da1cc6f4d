"""`channel_absmax` and `smooth_scale`: what SmoothQuant and static scales are computed from.

`channel_absmax` is bound by reading x once: 2 bytes per value of bfloat16. Rows are split among programs, each of which
writes the maxima of its rows; a second launch reduces those, 4 bytes per channel and program, from the cache. A maximum
is the same in any order, so results do not depend on the split; NaN is propagated by the instruction itself.

`smooth_scale` is K values; it computes in float64, because float32 cannot hold `strength * log2(maximum)` to 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .launch import ceil_div, chip, on
from .rounding import largest, row_absmax
from .rows import POINTERS, as_rows, row_limits

WARPS = 4
PROGRAMS = 8  # of four warps that a multiprocessor runs at once


@dataclass(frozen=True)
class ChannelTile:
    """A program takes `columns` channels of `part` rows, `rows` at a time."""

    rows: int
    columns: int
    part: int


def channel_tile(rows: int, k: int, dtype: torch.dtype, multiprocessors: int) -> ChannelTile:
    """Of x: 16 bytes per thread, so 512 bytes of a row per warp, four of them at a time; as many parts as keep
    the chip busy, of at least 64 rows."""
    columns = 32 * 16 // dtype.itemsize
    wanted = max(1, PROGRAMS * multiprocessors // ceil_div(k, columns))
    part = max(64, ceil_div(rows, wanted))
    return ChannelTile(4 * WARPS, columns, ceil_div(part, 4 * WARPS) * 4 * WARPS)


def partial_tile(parts: int) -> ChannelTile:
    """Of the maxima of the parts: all of them, 32 channels per program, so that many programs share little work."""
    return ChannelTile(128, 32, ceil_div(parts, 128) * 128)


@triton.jit(do_not_specialize=["rows", "part"])
def channel_absmax_kernel(x, running, out, rows, k, stride, part, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Part p of the rows of x -> row p of out, `[parts, k]`; with what `running` holds, which may be out."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = tl.program_id(1) * part
    last = first + tl.minimum(part, rows - first)
    inside = columns < k
    most = tl.zeros([ROWS, COLUMNS], tl.float32)
    start = first
    while start < last:
        row = start + tl.arange(0, ROWS)[:, None]
        source = x + row.to(tl.int64) * stride + columns
        most = largest(most, tl.abs(tl.load(source, (row < last) & inside, other=0.0).to(tl.float32)))
        start += ROWS
    found = row_absmax(most, 0)[None, :]
    if running is not None:
        found = largest(found, tl.load(running + columns, inside, other=0.0))
    tl.store(out + tl.program_id(1).to(tl.int64) * k + columns, found, inside)


@triton.jit(do_not_specialize=["k"])
def smooth_scale_kernel(activation, weight, out, strength, correction, k, BLOCK: tl.constexpr):
    """`strength + correction` is the exponent: arguments are float32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, w = tl.load(activation + at, at < k, other=0.0), tl.load(weight + at, at < k, other=0.0)
    exponent = tl.zeros([BLOCK], tl.float64) + strength + correction
    found = _power(a, exponent) / _power(w, 1.0 - exponent)
    tl.store(out + at, tl.where((a == 0) | (w == 0), 1.0, found.to(tl.float32)), at < k)


@triton.jit
def _power(base, exponent):
    """In float64, for base >= 0 (1 in place of 0, which has no logarithm); 1 for exponent 0, whatever the base."""
    logarithm = tl.log2(tl.where(base == 0, 1.0, base).to(tl.float64))
    return tl.where(exponent == 0, 1.0, tl.exp2(exponent * logarithm))


def _launch_absmax(x: Tensor, running: Tensor | None, out: Tensor, tile: ChannelTile) -> None:
    rows, k = x.shape
    grid = (ceil_div(k, tile.columns), max(1, ceil_div(rows, tile.part)))
    channel_absmax_kernel[grid](
        x=x,
        running=running,
        out=out,
        rows=rows,
        k=k,
        stride=x.stride(0),
        part=tile.part,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=WARPS,
    )


channel_absmax_limits = row_limits


def channel_absmax(x: Tensor, running: Tensor | None = None, *, out: Any = None) -> Any:
    """See `qkernels.ops.channel_absmax`. Rows that are not contiguous are copied first."""
    x = as_rows(x)
    rows, k = x.shape
    target = running
    if target is None:
        target = torch.empty(k, dtype=torch.float32, device=x.device) if out is None else out
    with on(x):
        tile = channel_tile(rows, k, x.dtype, chip(x.device).multiprocessors)
        parts = ceil_div(rows, tile.part)
        if parts > 1:
            maxima = torch.empty(parts, k, dtype=torch.float32, device=x.device)
            _launch_absmax(x, None, maxima, tile)
            x, tile = maxima, partial_tile(parts)
        _launch_absmax(x, running, target, tile)
    return target if running is None else None


def smooth_scale(act_absmax: Tensor, weight_absmax: Tensor, strength: float, *, out: Any = None) -> Any:
    """See `qkernels.ops.smooth_scale`."""
    k = len(act_absmax)
    out = torch.empty_like(act_absmax) if out is None else out
    single = torch.tensor(strength, dtype=torch.float32).item()
    if k:
        with on(act_absmax):
            grid = (ceil_div(k, 128),)
            smooth_scale_kernel[grid](
                activation=act_absmax,
                weight=weight_absmax,
                out=out,
                strength=single,
                correction=strength - single,
                k=k,
                BLOCK=128,
                num_warps=WARPS,
            )
    return out


def aot_cases() -> list[AotCase]:
    """Each input type, its partial maxima, running or not, aligned or not."""
    cases = []
    for dtype, running, aligned in (
        (torch.bfloat16, False, True),
        (torch.float16, True, True),
        (torch.float32, False, True),
        (torch.bfloat16, True, False),
    ):
        for name, tile in (("", channel_tile(16_448, 1024, dtype, 132)), ("-parts", partial_tile(256))):
            if name and dtype != torch.float32:
                continue
            pointers = {"x": POINTERS[dtype], "running": "*fp32", "out": "*fp32"}
            signature = pointers | dict.fromkeys(("rows", "k", "stride", "part"), "i32")
            constexprs: dict[str, Any] = {"ROWS": tile.rows, "COLUMNS": tile.columns}
            if not running:
                del signature["running"]
                constexprs["running"] = None
            cases.append(
                AotCase(
                    f"statistics-absmax{name}-{str(dtype).removeprefix('torch.')}{'' if aligned else '-unaligned'}",
                    channel_absmax_kernel,
                    signature,
                    constexprs,
                    tuple(key for key in signature if key not in ("rows", "part")) if aligned else (),
                    {"num_warps": WARPS},
                    dict.fromkeys((80, 90), ("LDG.E.128",) if aligned else ()),
                )
            )
    signature = {"activation": "*fp32", "weight": "*fp32", "out": "*fp32", "strength": "fp32", "correction": "fp32"}
    cases.append(
        AotCase(
            "statistics-smooth-scale",
            smooth_scale_kernel,
            {**signature, "k": "i32"},
            {"BLOCK": 128},
            ("activation", "weight", "out"),
            {"num_warps": WARPS},
        )
    )
    return cases
