"""Quantize-dequantize for training, and its gradients (`qkernels.ops.fake_quantize` states the formulas).

Bound by memory: the forward half reads and writes every value once (4 bytes per value in 16 bits), the backward half
reads two and writes one (6 bytes; "dorefa" 4), by loads and stores of 16 bytes where rows are multiples of 16 values.
Arithmetic is some 10 to 30 instructions per value, of the 27 (forward) and 41 that an H100 or H200 has time for.

A program works on a tile of runs x values (`qkernels.granularity`), or of rows x columns where every column has its own
scale, and goes on to `steps` tiles of the same scales. What its values add to the gradients of scale and offset it sums
in registers. That is the gradient where one program sees all values of a scale (weights by channel, groups: one
launch); elsewhere it is one of `terms` partial sums, which a second small kernel adds in their order. Tiles depend on
the shape alone: no atomics, the same bits on every chip and in every run.

One file, long as it is: the gradients walk over the tiles of the forward half, and are checked against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels.contract import ESTIMATORS, LEARNED_SCALE, OFFSET
from qkernels.granularity import Granularity, granularity, learned, new_gradients

from .aot import AotCase
from .launch import ceil_div, on, power_of_two, uncountable
from .rounding import EXACT, round_half_even, round_small

TILE = 4096  # values of a tile: 16 per thread, two loads of 16 bytes in 16 bits
WARPS = 8
ROWS = 64  # that a program sums at least where columns have their own scales: partial sums are 2 % of the traffic
TERMS = 4096  # partial sums at most, if those of one scale take several programs


@triton.jit
def _clamp(v, low, high):
    """NaN passes."""
    raised = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round(v, SMALL: tl.constexpr):
    return round_small(v) if SMALL else round_half_even(v)


@triton.jit
def _within(length, first, WIDTH: tl.constexpr):
    """How far the end of a run lies from `first`, in 32 bits: where its length needs 64, no further than a tile."""
    left = length - first
    if length.dtype == tl.int64:
        left = tl.minimum(left, WIDTH)
    return left.to(tl.int32)


@triton.jit
def _tile(block, first, runs, length, period, last, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Positions and mask `[HEIGHT, WIDTH]` of values first..first+WIDTH of runs block*HEIGHT..(block+1)*HEIGHT."""
    run = block * HEIGHT + tl.arange(0, HEIGHT)
    begin = (run // period).to(tl.int64) * ((period - 1) * length + last) + run % period * length
    at = tl.arange(0, WIDTH)
    # Lengths are compared as numbers, not as vectors of them: only so does the compiler see that a mask does not change
    # within 16 bytes. Subtracted in 64 bits: the end of a tile may lie past 2^31.
    mask = (run < runs)[:, None] & (at < _within(length, first, WIDTH))[None, :]
    if period > 1:
        mask &= (run % period < period - 1)[:, None] | (at < _within(last, first, WIDTH))[None, :]
    return (begin + first)[:, None] + at[None, :], mask


@triton.jit
def _scales(scale, zero, block, first, runs, scales, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Scale, its reciprocal and the zero point (or offset) of a tile, to broadcast with it; and their indices."""
    if COLUMNS:
        index = first.to(tl.int32) + tl.arange(0, WIDTH)
        there = index < scales
    else:
        run = block * HEIGHT + tl.arange(0, HEIGHT)
        index = run % scales
        there = run < runs
    s = tl.load(scale + index, there, other=1.0)
    z = tl.zeros_like(s)
    if zero is not None:
        z = tl.load(zero + index, there, other=0.0)
    inverse = tl.div_rn(1.0, s)
    if COLUMNS:
        return s[None, :], inverse[None, :], z[None, :]
    else:
        return s[:, None], inverse[:, None], z[:, None]


@triton.jit
def _place(program, across, steps, step, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The tile of a program's step: its row of tiles, and its first value (64 bits)."""
    down, along = program // across, program % across
    if COLUMNS:
        return down * steps + step, along.to(tl.int64) * WIDTH
    else:
        return down, (along * steps + step).to(tl.int64) * WIDTH


@triton.jit
def _forward(
    x,
    scale,
    zero,
    out,
    runs,
    length,
    period,
    last,
    scales,
    across,
    steps,
    low,
    high,
    OFFSET: tl.constexpr,
    SMALL: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`SMALL`: what is rounded is below 2^22 once it is clamped."""
    program = tl.program_id(0)
    block, first = _place(program, across, steps, 0, COLUMNS, WIDTH)
    s, inverse, z = _scales(scale, zero, block, first, runs, scales, COLUMNS, HEIGHT, WIDTH)
    for step in range(steps):
        block, first = _place(program, across, steps, step, COLUMNS, WIDTH)
        at, mask = _tile(block, first, runs, length, period, last, HEIGHT, WIDTH)
        v = tl.load(x + at, mask, other=0.0).to(tl.float32)
        if OFFSET:
            y = _round(_clamp((v - z) * inverse, low, high), SMALL) * s + z
        elif zero is not None:
            y = (_clamp(round_half_even(v * inverse) + z, low, high) - z) * s
        else:
            y = _round(_clamp(v * inverse, low, high), SMALL) * s
        tl.store(out + at, y.to(out.dtype.element_ty), mask)


@triton.jit
def _slopes(g, v, z, low, high, bend, ESTIMATOR: tl.constexpr, SMALL: tl.constexpr):
    """What a value gives to the gradients of x, of the scale and of the offset; v as the contract defines it."""
    if ESTIMATOR == "dorefa":
        return g, g, g
    if ESTIMATOR != "lsq_plus" and ESTIMATOR != "ewgs":
        low, high = low - z, high - z
    if ESTIMATOR == "pact":
        inside = (v > low) & (v < high)
    else:
        inside = (v >= low) & (v <= high)
    clamped = _clamp(v, low, high)
    code = _round(clamped, SMALL)  # outside the violated bound; NaN where v is
    bent = code * 0.0
    if ESTIMATOR == "ewgs":
        bent = bend * tl.abs(g) * (code - clamped)  # 0 outside
    if ESTIMATOR == "pact":
        of_scale = g * tl.where(inside, 0.0, code)
    elif ESTIMATOR == "ewgs":
        of_scale = g * (code - tl.where(inside, v, 0.0)) + bent * clamped
    else:
        of_scale = g * (code - tl.where(inside, v, 0.0))
    of_x = g - bent if ESTIMATOR == "ewgs" else g
    return tl.where(inside, of_x, 0.0), of_scale, tl.where(inside, 0.0, g) + bent


@triton.jit
def _backward(
    grad,
    x,
    scale,
    zero,
    dx,
    dscale,
    doffset,
    runs,
    length,
    period,
    last,
    scales,
    across,
    steps,
    low,
    high,
    bend,
    factor,
    ESTIMATOR: tl.constexpr,
    SMALL: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`dscale` and `doffset` (None where the estimator has none): the gradients, or `[terms, scales]` partial sums."""
    OFFSET: tl.constexpr = ESTIMATOR == "lsq_plus" or ESTIMATOR == "ewgs"
    program = tl.program_id(0)
    block, first = _place(program, across, steps, 0, COLUMNS, WIDTH)
    s, inverse, z = _scales(scale, zero, block, first, runs, scales, COLUMNS, HEIGHT, WIDTH)
    of_scales = tl.zeros([HEIGHT, WIDTH], tl.float32)
    of_offsets = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for step in range(steps):
        block, first = _place(program, across, steps, step, COLUMNS, WIDTH)
        at, mask = _tile(block, first, runs, length, period, last, HEIGHT, WIDTH)
        g = tl.load(grad + at, mask, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask, other=0.0).to(tl.float32)
        v = (v - z if OFFSET else v) * inverse
        of_x, of_scale, of_offset = _slopes(g, v, z, low, high, bend, ESTIMATOR, SMALL)
        tl.store(dx + at, of_x.to(dx.dtype.element_ty), mask)
        # Beyond the mask a scale without a finite reciprocal gives NaN.
        if dscale is not None:
            of_scales += tl.where(mask, of_scale, 0.0)
        if doffset is not None:
            of_offsets += tl.where(mask, of_offset, 0.0)
    down, along = program // across, program % across
    if COLUMNS:
        index = along * WIDTH + tl.arange(0, WIDTH)
        there = index < scales
        target = down * scales + index
    else:
        run = block * HEIGHT + tl.arange(0, HEIGHT)
        there = run < runs
        target = (run // scales * across + along) * scales + run % scales
    if dscale is not None:
        tl.store(dscale + target, tl.sum(of_scales, 0 if COLUMNS else 1) * factor, there)
    if doffset is not None:
        tl.store(doffset + target, tl.sum(of_offsets, 0 if COLUMNS else 1) * factor, there)


@triton.jit
def _column_sum(partial, column, there, terms, scales, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for begin in range(0, terms, HEIGHT):
        term = begin + tl.arange(0, HEIGHT)
        mask = (term < terms)[:, None] & there[None, :]
        total += tl.load(partial + term[:, None] * scales + column[None, :], mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _reduce(of_scales, of_offsets, dscale, doffset, terms, scales, factor, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """`[terms, scales]` partial sums -> `factor` times their sums over the terms."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    there = column < scales
    tl.store(dscale + column, _column_sum(of_scales, column, there, terms, scales, HEIGHT, WIDTH) * factor, there)
    if doffset is not None:
        total = _column_sum(of_offsets, column, there, terms, scales, HEIGHT, WIDTH)
        tl.store(doffset + column, total * factor, there)


@dataclass(frozen=True)
class Tiling:
    """How a kernel walks over the values: tiles of `height` runs x `width` values, or of rows x columns (`columns`);
    a grid of `down` x `across` programs of `steps` tiles each."""

    columns: bool
    height: int
    width: int
    down: int
    across: int
    steps: int

    def terms(self, grains: Granularity) -> int:
        """Partial sums of a scale."""
        return self.down if self.columns else grains.runs // grains.scales * self.across


def _tile_values(sums: bool, *lengths: int) -> int:
    """Values of a tile. Where lengths are no multiples of 16 values, every value needs an address of its own, and a
    program that also sums then has registers for half as many."""
    return TILE // 2 if sums and any(length % 16 for length in lengths) else TILE


def _fit(width: int, height: int, values: int) -> tuple[int, int]:
    """Height and width of a tile for so many rows and columns: rows of 768 are three tiles of 256, not one of 1024."""
    whole = min(values, power_of_two(width))
    divisor = width & -width
    if 128 <= divisor < whole and height >= values // divisor:
        whole = divisor
    return min(values // whole, power_of_two(height)), whole


def tiling(grains: Granularity, sums: bool) -> Tiling:
    """Tiles for a tensor; `sums`: a program should see many values of a scale, for it leaves their sum."""
    if grains.by_columns:
        rows, columns = grains.runs // grains.scales, grains.scales
        height, width = _fit(columns, rows, _tile_values(sums, columns))
        steps = ceil_div(min(rows, max(ROWS, ceil_div(rows, TERMS // 4))), height)
        return Tiling(True, height, width, ceil_div(rows, height * steps), ceil_div(columns, width), steps)
    height, width = _fit(grains.length, grains.runs, _tile_values(sums, grains.length, grains.last))
    down, tiles = ceil_div(grains.runs, height), ceil_div(grains.length, width)
    across = tiles
    if sums:
        across = 1 if tiles <= 8 and down >= 32 else min(tiles, ceil_div(TERMS, down))
    steps = ceil_div(tiles, across)
    return Tiling(False, height, width, down, ceil_div(tiles, steps), steps)


def _layout(grains: Granularity) -> Granularity:
    """As the kernels read it: rows of a matrix are runs of its width."""
    if grains.by_columns:
        return Granularity(grains.runs // grains.scales, grains.scales, 1, grains.scales, grains.scales)
    return grains


def fake_quantize_limits(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    estimator: str,
    axis: int | None = None,
    group: int | None = None,
    *_: Any,
    **__: Any,
) -> str | None:
    """What the kernels cannot take, worded to follow "the triton backend"."""
    if not x.numel():
        return None
    grains = granularity(x, scale, axis, group)
    counts = {
        "runs of one scale": _layout(grains).runs,
        "scales": grains.scales,
        "the values of a row of groups": grains.period * grains.length if grains.period > 1 else 0,
    }
    return uncountable(counts)


def fake_quantize_backward_limits(grad: Tensor, *forward: Any, **options: Any) -> str | None:
    """The same for the gradients."""
    return fake_quantize_limits(*forward, **options)


def _small(qmin: int, qmax: int, zero_point: Tensor | None, estimator: str) -> bool:
    """Whether clamped values of v are below 2^22; integer zero points, whose values are not known here, move bounds."""
    return -(2**22) < qmin and qmax < 2**22 and (zero_point is None or estimator in OFFSET)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    estimator: str,
    axis: int | None = None,
    group: int | None = None,
    grad_scale: float = 1.0,
    delta: float = 0.0,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.fake_quantize`; the forward half."""
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    if x.numel():
        grains = granularity(x, scale, axis, group)
        tiles = tiling(grains, False)
        with on(x):
            _forward[(tiles.down * tiles.across,)](
                x=x,
                scale=scale,
                zero=zero_point,
                out=out,
                **_layout(grains)._asdict(),
                across=tiles.across,
                steps=tiles.steps,
                low=float(qmin),
                high=float(qmax),
                OFFSET=estimator in OFFSET,
                SMALL=_small(qmin, qmax, zero_point, estimator),
                COLUMNS=tiles.columns,
                HEIGHT=tiles.height,
                WIDTH=tiles.width,
                num_warps=WARPS,
                **EXACT,
            )
    return out


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    estimator: str,
    axis: int | None = None,
    group: int | None = None,
    grad_scale: float = 1.0,
    delta: float = 0.0,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.reference.fake_quantize_backward`. One launch, or two."""
    grad, x = grad.contiguous(), x.contiguous()
    has = learned(zero_point, estimator)
    out = new_gradients(x, scale, has) if out is None else out
    if not x.numel():
        for sums in out[1:]:
            sums.zero_()
        return out
    dx, *wanted = (target if there else None for target, there in zip(out, (True, *has), strict=True))
    grains = granularity(x, scale, axis, group)
    tiles = tiling(grains, has[0])
    terms = tiles.terms(grains)
    partial = wanted
    if has[0] and terms > 1:
        sums = torch.empty(sum(has), terms, grains.scales, dtype=torch.float32, device=x.device)
        partial = [sums[0], sums[1] if has[1] else None]
    with on(x):
        _backward[(tiles.down * tiles.across,)](
            grad=grad,
            x=x,
            scale=scale,
            zero=zero_point,
            dx=dx,
            dscale=partial[0],
            doffset=partial[1],
            **_layout(grains)._asdict(),
            across=tiles.across,
            steps=tiles.steps,
            low=float(qmin),
            high=float(qmax),
            bend=delta / (qmax - qmin),
            factor=1.0 if terms > 1 else grad_scale,
            ESTIMATOR=estimator,
            SMALL=_small(qmin, qmax, zero_point, estimator),
            COLUMNS=tiles.columns,
            HEIGHT=tiles.height,
            WIDTH=tiles.width,
            num_warps=WARPS,
            **EXACT,
        )
        if has[0] and terms > 1:
            width = min(16, power_of_two(grains.scales))
            _reduce[(ceil_div(grains.scales, width),)](
                of_scales=partial[0],
                of_offsets=partial[1],
                dscale=wanted[0],
                doffset=wanted[1],
                terms=terms,
                scales=grains.scales,
                factor=grad_scale,
                HEIGHT=min(TILE // width, power_of_two(terms)),
                WIDTH=width,
                num_warps=WARPS,
            )
    return out


# name: sizes of `Granularity`, of which those that a launch would specialize are constants; tile; steps or None
_WAYS: dict[str, tuple[dict[str, int | None], bool, tuple[int, int]]] = {
    "tensor": ({"runs": 1, "period": 1, "scales": 1, "steps": 1}, False, (1, 4096)),
    "rows": ({"period": 1, "across": 1}, False, (16, 256)),
    "groups": ({"across": 1, "steps": 1}, False, (32, 128)),
    "columns": ({"period": 1}, True, (16, 256)),
}


def _case(kernel: Any, way: str, estimator: str, dtype: str, aligned: bool, zero: bool) -> AotCase:
    constants, columns, (height, width) = _WAYS[way]
    forward = kernel is _forward
    if not aligned and not forward:
        height, width = (height // 2, width) if height > 1 else (1, width // 2)
    pointers = {"x": dtype, "scale": "fp32"}
    pointers |= {"out": dtype} if forward else {"grad": dtype, "dx": dtype}
    if zero:
        pointers["zero"] = "fp32"
    if not forward and estimator in LEARNED_SCALE:
        pointers["dscale"] = "fp32"
    if not forward and estimator in OFFSET and zero:
        pointers["doffset"] = "fp32"
    integers = {"runs", "length", "period", "last", "scales", "across", "steps"} - constants.keys()
    floats = ("low", "high") if forward else ("low", "high", "bend", "factor")
    fixed: dict[str, Any] = {"COLUMNS": columns, "HEIGHT": height, "WIDTH": width, **constants}
    fixed["SMALL"] = not zero or estimator in OFFSET
    fixed |= {"OFFSET": estimator in OFFSET} if forward else {"ESTIMATOR": estimator}
    absent = {"zero"} if forward else {"zero", "dscale", "doffset"}
    fixed |= dict.fromkeys(absent - pointers.keys())
    # A launch sees that pointers are multiples of 16 nearly always, sizes where the model's widths are.
    sizes = {"runs", "length", "last", "scales"} & integers if aligned else set()
    words = ["fake_quantize", "forward" if forward else "backward", estimator, way, dtype]
    return AotCase(
        name="-".join([*words, "aligned" if aligned else "odd", *["zero"] * zero]),
        kernel=kernel,
        signature={
            **{name: f"*{kind}" for name, kind in pointers.items()},
            **dict.fromkeys(integers, "i32"),
            **dict.fromkeys(floats, "fp32"),
        },
        constexprs=fixed,
        divisible=(*pointers, *sizes),
        options={"num_warps": WARPS, **EXACT},
        contains={chip: ("LDG.E.128", "STG.E.128") for chip in (80, 90)} if aligned else {},
        forbids=("LDL", "STL", "RED", "ATOM"),
    )


def aot_cases() -> list[AotCase]:
    """Every kernel with every estimator and way of sharing; in other dtypes and for odd sizes those that do most."""
    cases = [
        _case(_forward, way, estimator, "bf16", True, zero)
        for way in _WAYS
        for estimator, zero in (("lsq", False), ("lsq", True), ("lsq_plus", True))
    ]
    cases += [
        _case(_backward, way, estimator, "bf16", True, estimator in OFFSET)
        for way in ("tensor", "columns")
        for estimator in ESTIMATORS
    ]
    for kernel in (_forward, _backward):
        cases += [_case(kernel, way, "ewgs", "bf16", False, True) for way in _WAYS]
        cases += [_case(kernel, "rows", "lsq", dtype, True, False) for dtype in ("fp32", "fp16")]
    cases += [_case(_backward, way, "ewgs", "bf16", True, True) for way in ("rows", "groups")]
    for scales, (height, width) in ((1, (4096, 1)), (None, (256, 16))):
        pointers = ("of_scales", "of_offsets", "dscale", "doffset")
        cases.append(
            AotCase(
                name=f"fake_quantize-reduce-{'tensor' if scales else 'columns'}",
                kernel=_reduce,
                signature={
                    **dict.fromkeys(pointers, "*fp32"),
                    "terms": "i32",
                    "factor": "fp32",
                    **({} if scales else {"scales": "i32"}),
                },
                constexprs={"HEIGHT": height, "WIDTH": width, **({"scales": 1} if scales else {})},
                divisible=pointers,
                options={"num_warps": WARPS},
                forbids=("LDL", "STL", "RED", "ATOM"),
            )
        )
    return cases
