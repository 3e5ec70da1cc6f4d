"""`softmax(scale * q k^T + mask) v` for the short sequences of CLIP (50 to 729 tokens), int8 output included.

A program computes ROWS queries of one head. It walks over the keys KEYS at a time with the running maximum and sum of
the softmax, so any length fits; programs of one head are neighbours and find its keys and values in L2. q, k and v are
read in place, wherever the d values of a head lie together; d is padded to a power of two with zeros, in registers and
shared memory only.

16-bit input is multiplied by tensor cores with float32 sums; probabilities are rounded to the input's dtype for the
second product. Float32 input is cut in three tf32 products ("tf32x3", about 2^-21 relative): exact float32 products
(input_precision="ieee") have no tensor cores and hold whole operands in registers, more than there are.

What bounds it: exp (16 per clock and multiprocessor), then the traffic of keys and values from L2, which tall tiles
halve; the products come third. So int8 products for q k^T are left out: at 257 tokens attention is 5-8 % of a ViT-L,
half of its products are q k^T, and quantizing q and k costs a pass: 1-2 % could be won at 257 tokens and 3-4 % at 577.

int8 by a given scale is written at once. The dynamic rule needs the largest magnitude over all heads of a token, so
float results go to a scratch tensor of q's dtype and `quantize_per_token` reads it: two launches, no host sync. A
program that loops over the heads of its rows would keep the scratch in cache, but has H times fewer programs, each H
times longer: 12 heads in turn on one multiprocessor cost more at batch 1 than a launch (2-3 us), and at large batches
the pass reads 2 and writes 1 byte per value, less than the projections around it. For 16-bit input the scratch rounds
once more, like the float result itself.

A value that is not finite reaches every query that attends its key; behind a mask it may (as 0 * inf) or may not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted, launch
from .aot import AotCase
from .launch import SM80, SM90, Chip
from .quantize import quantize_per_token
from .rounding import is_finite, static_codes

NO_MASK, BOOL_MASK, FLOAT_MASK = 0, 1, 2
NOT_STATIC, ONE_SCALE, SCALES = 0, 1, 2
LOG2E = 1 / math.log(2)
WIDEST = {4: 128, 2: 256}  # head width by bytes per value: the registers hold no more
FAR = 2**31  # offsets within a head are 32 bits

_LOG2E: tl.constexpr = tl.constexpr(LOG2E)
_LOWEST: tl.constexpr = tl.constexpr(float("-inf"))
_UNSPECIALIZED = [
    "q_batch",
    "q_row",
    "q_head",
    "k_batch",
    "k_row",
    "k_head",
    "v_batch",
    "v_row",
    "v_head",
    "mask_batch",
    "mask_head",
    "mask_row",
    "mask_key",
    "queries",
    "keys",
    "heads",
]


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """`acc + a @ b` in float32. WIDEN: for the interpreter, which multiplies the bits of bfloat16 as integers."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    out_scale_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    mask_batch,
    mask_head,
    mask_row,
    mask_key,
    queries,
    keys,
    heads,
    scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    STATIC: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Strides of q, k and v are in units of ALIGN values: so the compiler knows what they are multiples of.
    `scale` holds the factor log2(e), but beside a float mask: the lowest float32 must stay one there."""
    tiles = tl.cdiv(queries, ROWS)
    program = tl.program_id(0)
    tile, head = program % tiles, program // tiles % heads
    batch = (program // tiles // heads).to(tl.int64)
    q_ptr += (batch * q_batch + head * q_head.to(tl.int64)) * ALIGN
    k_ptr += (batch * k_batch + head * k_head.to(tl.int64)) * ALIGN
    v_ptr += (batch * v_batch + head * v_head.to(tl.int64)) * ALIGN
    rows, columns = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = (columns < WIDTH)[None, :]
    real = (rows < queries)[:, None]
    unit: tl.constexpr = _LOG2E if MASK == 2 else 1.0
    q = tl.load(q_ptr + rows[:, None] * (q_row * ALIGN) + columns[None, :], mask=real & inside, other=0.0)
    largest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    end = tl.minimum(keys, (tile + 1) * ROWS) if CAUSAL else keys
    for start in range(0, end, KEYS):
        found = start + tl.arange(0, KEYS)
        there = (found < keys)[:, None] & inside
        k = tl.load(k_ptr + found[:, None] * (k_row * ALIGN) + columns[None, :], mask=there, other=0.0)
        s = _product(q, tl.trans(k), tl.zeros([ROWS, KEYS], tl.float32), PRECISION, WIDEN) * scale
        seen = (found < keys)[None, :]
        if MASK != 0:
            at = mask_ptr + batch * mask_batch + head * mask_head.to(tl.int64)
            at += rows[:, None] * mask_row + found[None, :] * mask_key
            mask = tl.load(at, mask=real & seen, other=0)
            if MASK == 1:
                seen = seen & (mask != 0)
            else:
                s += mask.to(tl.float32)
        if CAUSAL:
            seen = seen & (found[None, :] <= rows[:, None])
        s = tl.where(seen, s, _LOWEST)
        # A maximum may pass over NaN: the weight is NaN all the same, and with it the sum and the row.
        higher = tl.maximum(largest, tl.max(s, 1))
        shift = tl.where(higher == _LOWEST, 0.0, higher)
        weights = tl.exp2((s - shift[:, None]) * unit)
        kept = tl.exp2((largest - shift) * unit)
        total = total * kept + tl.sum(weights, 1)
        v = tl.load(v_ptr + found[:, None] * (v_row * ALIGN) + columns[None, :], mask=there, other=0.0)
        acc = _product(weights.to(v.dtype), v, acc * kept[:, None], PRECISION, WIDEN)
        largest = higher
    y = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]  # a sum of 0: nothing may be attended
    out_ptr += (batch * queries * heads + head) * WIDTH
    at = out_ptr + rows[:, None] * (heads * WIDTH) + columns[None, :]
    if STATIC == 0:
        tl.store(at, y.to(out_ptr.dtype.element_ty), mask=real & inside)
    else:
        if STATIC == 1:
            inverse = tl.div_rn(1.0, tl.load(out_scale_ptr))
            steps = y * inverse
        else:
            scales = tl.load(out_scale_ptr + head * WIDTH + columns, mask=columns < WIDTH, other=1.0)
            inverse = tl.div_rn(1.0, scales)[None, :]
            steps = y * inverse
        tl.store(at, static_codes(y, inverse, 0.0, is_finite(y) & (steps == steps)), mask=real & inside)


@dataclass(frozen=True)
class Variant:
    """What a launch is specialized for."""

    dtype: torch.dtype
    width: int
    tall: bool  # more than 64 queries, and programs enough for the whole chip with 128 of them each
    few: bool  # at most 16 queries
    mask: int = NO_MASK
    causal: bool = False
    static: int = NOT_STATIC
    aligned: bool = True  # all addresses are multiples of 16 bytes


@dataclass(frozen=True)
class Configuration:
    """A tile has ROWS queries and KEYS keys; `warps` per program. Two stages: the next keys load meanwhile."""

    rows: int
    keys: int
    warps: int

    def legal(self, padded: int, itemsize: int, chip: Chip) -> bool:
        """Fits the shared memory, and has rows for every warp's 16."""
        tiles = self.rows * max(padded, self.keys) + 4 * self.keys * padded  # q or weights; keys and values, twice
        return tiles * itemsize <= chip.shared and self.rows <= 16 * self.warps


def configuration(v: Variant, chip: Chip) -> Configuration:
    """The largest tile whose registers do not spill, by what the compiler said for sm_80 and sm_90."""
    padded, plain, hopper = _padded(v.width), v.aligned and v.mask == NO_MASK, chip.capability >= 90
    if padded > (128 if v.dtype != torch.float32 else 64):
        return Configuration(16, 32, 8)
    if v.dtype == torch.float32:  # both halves of each operand are in registers
        return Configuration(16 if v.few else 64, 16, 4)
    if v.few:
        return Configuration(16, 64, 4)
    if v.tall and plain:
        return Configuration(128, 64, 8)
    if padded <= 64:
        return Configuration(64, 64 if plain and hopper else 32, 4)
    return Configuration(64, 32 if plain else 16, 4 if plain and hopper else 8)


def _padded(width: int) -> int:
    return max(16, launch.power_of_two(width))


def _constants(v: Variant, c: Configuration) -> dict[str, Any]:
    return {
        "WIDTH": v.width,
        "PADDED": _padded(v.width),
        "ROWS": c.rows,
        "KEYS": c.keys,
        "MASK": v.mask,
        "CAUSAL": v.causal,
        "STATIC": v.static,
        "ALIGN": 16 // v.dtype.itemsize if v.aligned else 1,
        "PRECISION": "tf32x3" if v.dtype == torch.float32 else "ieee",
        "WIDEN": interpreted() and v.dtype == torch.bfloat16,
    }


def attention_limits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> str | None:
    """What the kernel cannot take, worded to follow "the triton backend"."""
    (batch, queries, heads, d), keys, widest = q.shape, k.shape[1], WIDEST[q.itemsize]
    if d > widest:
        return f"takes {q.dtype} heads of width {widest} at most, not {d}"
    counts = {
        "queries of all heads": batch * heads * queries,
        "the values of a sequence": max(queries, keys) * heads * d,
        "the values of a head's mask": 0 if mask is None else queries * keys,
    }
    return launch.uncountable(counts)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    out_scale: Tensor | None = None,
    out_dynamic: bool = False,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.attention`."""
    (batch, queries, heads, d), keys = q.shape, k.shape[1]
    if out is None:
        out = torch.empty(
            q.shape, dtype=q.dtype if out_scale is None and not out_dynamic else torch.int8, device=q.device
        )
        out = (out, torch.empty(batch, queries, dtype=torch.float32, device=q.device)) if out_dynamic else out
    if out_dynamic:
        y = attention(q, k, v, mask, causal, scale).view(batch, queries, heads * d)
        quantize_per_token(y, out=(out[0].view(y.shape), out[1]))
        return out
    if not q.numel():
        return out
    q, k, v = (_readable(t) for t in (q, k, v))
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        if (queries - 1) * mask.stride(2) + (keys - 1) * mask.stride(3) >= FAR:
            mask = mask.contiguous()
        mask = mask.view(torch.uint8) if kind == BOOL_MASK else mask
    unit = 16 // q.itemsize
    strides = [_strides(t) for t in (q, k, v)]
    aligned = all(t.data_ptr() % 16 == 0 for t in (q, k, v)) and all(s % unit == 0 for t in strides for s in t)
    chip = launch.chip(q.device)
    tall = queries > 64 and batch * heads * launch.ceil_div(queries, 128) >= chip.multiprocessors
    static = NOT_STATIC if out_scale is None else ONE_SCALE if out_scale.dim() == 0 else SCALES
    variant = Variant(q.dtype, d, tall, queries <= 16, kind, causal, static, aligned)
    chosen = configuration(variant, chip)
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    factor = (d**-0.5 if scale is None else scale) * (1.0 if kind == FLOAT_MASK else LOG2E)
    with launch.on(q):
        attention_kernel[(batch * heads * launch.ceil_div(queries, chosen.rows),)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            mask_ptr=mask,
            out_ptr=out,
            out_scale_ptr=out_scale,
            **_named("q", strides[0], unit if aligned else 1),
            **_named("k", strides[1], unit if aligned else 1),
            **_named("v", strides[2], unit if aligned else 1),
            mask_batch=mask_strides[0],
            mask_head=mask_strides[1],
            mask_row=mask_strides[2],
            mask_key=mask_strides[3],
            queries=queries,
            keys=keys,
            heads=heads,
            scale=factor,
            **_constants(variant, chosen),
            num_warps=chosen.warps,
            num_stages=2,
        )
    return out


def _named(tensor: str, strides: list[int], unit: int) -> dict[str, int]:
    """Strides of q, k or v as the kernel calls them, in units of so many values."""
    return {f"{tensor}_{axis}": s // unit for axis, s in zip(("batch", "row", "head"), strides, strict=True)}


def _readable(t: Tensor) -> Tensor:
    """The tensor, or a copy where a head's values lie apart or its rows so far apart that 32 bits cannot tell."""
    return t if t.stride(3) == 1 and t.stride(1) * (t.shape[1] - 1) < FAR else t.contiguous()


def _strides(t: Tensor) -> list[int]:
    """Of batch, row and head; 0 for an axis of one, whose stride means nothing."""
    return [0 if t.shape[axis] == 1 else t.stride(axis) for axis in (0, 1, 2)]


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def aot_cases() -> list[AotCase]:
    """Every configuration with addresses that are multiples of 16 bytes and with others, as plain as it comes and with
    all that adds registers: a mask, causal, a scale for each result."""
    half, single, cases = torch.bfloat16, torch.float32, []
    sizes = {"few": (False, True), "short": (False, False), "tall": (True, False)}
    every, ends = ("plain", "causal-codes", "mask", "unaligned"), ("plain", "unaligned")
    for capability, chip in ((80, SM80), (90, SM90)):
        for dtype, width, size, kinds in (
            *((half, width, "short", every) for width in (64, 80)),
            *((half, width, "tall", every[:2]) for width in (64, 80)),
            *((half, width, "few", ends) for width in (64, 128)),
            *((half, width, "short", ends) for width in (32, 256)),
            *((single, width, "short", ends) for width in (20, 64, 96)),
            *((torch.float16, 64, "tall", ("bits",)), (single, 64, "few", ends)),
        ):
            first = Variant(dtype, width, *sizes[size])
            full = replace(first, causal=True, static=SCALES)
            for kind in kinds:
                variant = {
                    "plain": first,
                    "causal-codes": full,
                    "mask": replace(full, mask=FLOAT_MASK),
                    "unaligned": replace(full, mask=FLOAT_MASK, aligned=False),
                    "bits": replace(first, mask=BOOL_MASK, static=ONE_SCALE),
                }[kind]
                cases.append(_case(f"attention-{_TYPES[dtype]}-{width}-{size}-{kind}", variant, capability, chip))
    return cases


def _case(name: str, v: Variant, capability: int, chip: Chip) -> AotCase:
    chosen = configuration(v, chip)
    assert chosen.legal(_padded(v.width), v.dtype.itemsize, chip)
    kind = _TYPES[v.dtype]
    signature = {name: f"*{kind}" for name in ("q_ptr", "k_ptr", "v_ptr")}
    signature["out_ptr"] = f"*{kind}" if v.static == NOT_STATIC else "*i8"
    constants = _constants(v, chosen)
    if v.mask == NO_MASK:
        constants["mask_ptr"] = None
    else:
        signature["mask_ptr"] = "*u8" if v.mask == BOOL_MASK else "*fp32"
    if v.static == NOT_STATIC:
        constants["out_scale_ptr"] = None
    else:
        signature["out_scale_ptr"] = "*fp32"
    pointers = tuple(signature)
    signature |= dict.fromkeys(_UNSPECIALIZED, "i32") | {"scale": "fp32"}
    product = "HGMMA" if capability == 90 and chosen.rows >= 64 else "HMMA"
    loads = ("LDGSTS",) if v.aligned else ()  # asynchronous copies
    return AotCase(
        f"{name}-{capability}",
        attention_kernel,
        signature,
        constants,
        pointers if v.aligned else (),
        {"num_warps": chosen.warps, "num_stages": 2},
        {capability: (product, *loads)},
        (),
        (capability,),
    )
