"""`hadamard_transform`: rows of n = A * B values as matrices X `[A, B]`, `Y = H_A (X S_B) / sqrt(n)`.

S_B is Sylvester's matrix of at most 64 rows (32 for float32), H_A the base matrix times a Sylvester matrix, of at most
64 rows or the base order. Both are products by tensor cores with operands of +-1: exact for 16-bit X, and in three TF32
products, whose error is that of float32, for float32 values. Wider rows go through twice or more: blocks of them first,
then H of what remains across the blocks, float32 in between.

Bound by memory: an element is read and written once in its own type, 4 bytes of bfloat16 (0.93 ns for 1,000 elements
at the 4.3 TB/s of an H200); twice, with 8 bytes between, where a row is wider.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels.hadamard import base_matrix, base_order

from . import interpreted
from .aot import AotCase
from .launch import ceil_div, on, power_of_two
from .rows import POINTERS, as_rows, row_limits

FAST = {2: 64, 4: 32}  # widest S, by the bytes of a value: float32 takes three times the registers
SLOW = 64  # widest H, where the base matrix is not wider
SMALLEST = 16  # that a tensor core's product takes: smaller matrices stand in a corner of zeros


@dataclass(frozen=True)
class Pass:
    """One launch: matrices `[slow, fast]` with `stride` elements between their lines, transformed along the slow axis
    by H of order `slow`, of base `base`, and along the fast one by S where `both`."""

    slow: int
    fast: int
    base: int
    both: bool


def passes(n: int, dtype: torch.dtype) -> tuple[Pass, ...]:
    """How rows of n values of a dtype are transformed: in one pass, or blocks of them first, then across the blocks."""
    base = base_order(n)
    assert base is not None
    widest = FAST[dtype.itemsize] if base <= SLOW else SMALLEST
    fast = min(widest, n // base)
    if n // fast <= max(SLOW, base):
        while fast > SMALLEST and 2 * (n // fast) <= fast:
            fast //= 2  # nearer to a square: fewer operations
        return (Pass(n // fast, fast, base, True),)
    slow = n // min(widest**2, n // base)
    while slow > max(SLOW, base):
        slow //= 2
    return (*passes(n // slow, dtype), Pass(slow, n // slow, base, False))


@functools.cache
def _matrix(order: int, base: int, transpose: bool, padded: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Base matrix (x) Sylvester's of +-1, transposed or not, in the corner of `[padded, padded]` zeros. Kept for good:
    a CUDA graph goes on reading it at its address, and nobody else knows of it."""
    matrix = base_matrix(base).float()
    while len(matrix) < order:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    result = torch.zeros(padded, padded)
    result[:order, :order] = matrix.t() if transpose else matrix
    return result.to(device=device, dtype=dtype)


@triton.jit
def hadamard_kernel(
    x,
    out,
    slow_matrix,
    fast_matrix,
    factor,
    stride,
    SLOW: tl.constexpr,
    FAST: tl.constexpr,
    SLOW_TILE: tl.constexpr,
    FAST_TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One matrix `[SLOW, FAST]` (or FAST_TILE columns of it), `stride` elements after the last, times `factor`. Tiles
    and matrices are padded with zeros. Without a fast matrix (None) only the slow axis is transformed."""
    matrix = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * FAST_TILE + tl.arange(0, FAST_TILE)[None, :]
    lines = tl.arange(0, SLOW_TILE)[:, None]
    y = tl.zeros([SLOW_TILE, FAST_TILE], tl.float32)
    for start in tl.static_range(0, SLOW_TILE, CHUNK):
        part = start + tl.arange(0, CHUNK)
        mask = (part[:, None] < SLOW) & (columns < FAST)
        v = tl.load(x + matrix * stride + part[:, None] * FAST + columns, mask, other=0.0)
        if fast_matrix is not None:
            within = tl.arange(0, FAST_TILE)
            s = tl.load(fast_matrix + within[:, None] * FAST_TILE + within[None, :])
            v = tl.dot(v.to(fast_matrix.dtype.element_ty), s, input_precision="tf32x3")
        h = tl.load(slow_matrix + lines * SLOW_TILE + part[None, :])
        y = tl.dot(h, v, y, input_precision="tf32x3")
    target = out + matrix * (SLOW * FAST) + lines * FAST + columns
    tl.store(target, (y * factor).to(out.dtype.element_ty), (lines < SLOW) & (columns < FAST))


def _tiles(step: Pass) -> dict[str, int]:
    """The sizes of a pass: tiles that hold the matrices (or some of the columns), 32 lines of X at a time."""
    slow = max(SMALLEST, power_of_two(step.slow))
    fast = max(SMALLEST, step.fast) if step.both else min(step.fast, 64 if slow <= SLOW else 32)
    return {"SLOW": step.slow, "FAST": step.fast, "SLOW_TILE": slow, "FAST_TILE": fast, "CHUNK": min(32, slow)}


def _warps(tiles: dict[str, int]) -> int:
    return min(8, max(1, tiles["SLOW_TILE"] * tiles["FAST_TILE"] // 512))


def _launch(x: Tensor, out: Tensor, step: Pass, transpose: bool, factor: float) -> None:
    tiles = _tiles(step)
    slow = _matrix(step.slow, step.base, transpose, tiles["SLOW_TILE"], torch.float32, x.device)
    kind = torch.float32 if interpreted() else x.dtype  # the interpreter multiplies the bits of bfloat16
    fast = _matrix(step.fast, 1, False, tiles["FAST_TILE"], kind, x.device) if step.both else None
    grid = (len(x), ceil_div(step.fast, tiles["FAST_TILE"]))
    hadamard_kernel[grid](
        x=x,
        out=out,
        slow_matrix=slow,
        fast_matrix=fast,
        factor=factor,
        stride=x.stride(0),
        **tiles,
        num_warps=_warps(tiles),
    )


hadamard_transform_limits = row_limits


def hadamard_transform(x: Tensor, transpose: bool = False, *, out: Any = None) -> Any:
    """See `qkernels.ops.hadamard_transform`. Rows that are not contiguous are copied first; between two passes they are
    float32."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    n = x.shape[-1]
    x = as_rows(x)
    if not x.numel():
        return out
    *before, last = passes(n, x.dtype)
    with on(x):
        for step in before:
            between = torch.empty(x.shape, dtype=torch.float32, device=x.device)
            _launch(x.reshape(-1, step.slow * step.fast), between, step, transpose, 1.0)
            x = between
        _launch(x, out, last, transpose, 1 / math.sqrt(n))
    return out


def aot_cases() -> list[AotCase]:
    """Widths of CLIP's towers, the smallest, the widest base, both passes of a wide row; each input type."""
    cases = []
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for n, dtype in ((8, fp32), (768, bf16), (1024, fp16), (1664, bf16), (4096, bf16), (4096, fp32)):
        for number, step in enumerate(passes(n, dtype)):
            tiles = _tiles(step)
            kind = POINTERS[dtype if number == 0 else fp32]
            result = POINTERS[dtype if number == len(passes(n, dtype)) - 1 else fp32]
            signature = {"x": kind, "out": result, "slow_matrix": "*fp32", "factor": "fp32", "stride": "i32"}
            constexprs: dict[str, Any] = dict(tiles)
            if step.both:
                signature["fast_matrix"] = kind
            else:
                constexprs["fast_matrix"] = None
            divisible = tuple(key for key in signature if key != "factor" and (key != "stride" or n % 16 == 0))
            options = {"num_warps": _warps(tiles)}
            name = f"hadamard-{str(dtype).removeprefix('torch.')}-{n}-{number}"
            cases.append(AotCase(name, hadamard_kernel, signature, constexprs, divisible, options))
            if n == 768:
                cases.append(AotCase(f"{name}-unaligned", hadamard_kernel, signature, constexprs, (), options))
    return cases
