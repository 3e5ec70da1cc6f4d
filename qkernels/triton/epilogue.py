"""What both linear ops do after their products, as Triton functions and as the launcher's preparation of arguments.

    y = activation(fma(float(acc), x_scale * w_scale, bias)) + residual -> float, int8 by a static scale, or int8 with a
    scale for 128 columns of a row

Tiles are `[rows, columns]` of the output, also where a kernel had weights as the left operand and transposed its sums.

All three activations are `y / (1 + 2^-t(y))`: two special functions per output, the rest multiply-adds. For "gelu", t
is the base-2 logit of the normal distribution, `y * P(y^2)` with P fitted to an error of gelu below 1.9e-7 (in float32:
7e-7, a third of what the contract allows). Beyond |y| = 6 the factor is within 1e-9 of 0 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels.contract import GROUP, Epilogue
from qkernels.weights import Int4Weight, Int8Weight

from .aot import AotCase
from .launch import ceil_div, on, uncountable
from .rounding import dynamic_codes, dynamic_scale, is_finite, round_half_even, row_absmax, static_scale


@triton.jit
def tile_of(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """Index -> (row tile, column tile): bands of BAND row tiles, in each of which rows run first."""
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = index // (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = index % (BAND * column_tiles)
    return band * BAND + within % height, within // height


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        s = tl.minimum(y * y, 36.0)
        p = 3.83386076e-09 * s - 3.27973296e-07
        p = p * s + 1.06002468e-05
        p = p * s - 1.53667212e-04
        p = p * s - 1.13189873e-04
        p = p * s + 1.04860833e-01
        p = p * s + 2.30219900
        return y / (1.0 + tl.exp2(-y * p))
    elif ACTIVATION == "gelu_tanh":  # 2 sqrt(2/pi) log2(e) (y + 0.044715 y^3)
        return y / (1.0 + tl.exp2(-y * (0.10294324 * (y * y) + 2.30220819)))
    elif ACTIVATION == "quick_gelu":  # 1.702 log2(e) y
        return y / (1.0 + tl.exp2(y * -2.45546696))
    else:
        return y


@triton.jit
def write(
    acc,
    first_row,
    columns,
    M,
    N,
    x_scale,
    w_scale,
    bias,
    residual,
    out,
    out_scale,
    out_zero,
    group_scales,
    X_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT: tl.constexpr,
):
    """The epilogue of a tile of sums, rows `first_row` and on, into `out` (`[M, N]`, contiguous). Offsets are 64 bits
    wide up to the tile, and 32 within it.

    X_SCALE: "one" number or one per "row"; anything else: `acc` has that scale already. `w_scale` None: `acc` has the
    weight's. OUT: "float"; "tensor" or "channel": int8 by one static scale, or one per column; "group": int8 by the
    dynamic rule over the columns of the tile, which must be 128.
    """
    lines = tl.arange(0, acc.shape[0])
    rows = first_row + lines
    in_columns, in_rows = columns < N, rows < M
    y = acc.to(tl.float32)
    if X_SCALE == "row":
        scale = tl.load(x_scale + rows, mask=in_rows, other=0.0)[:, None]
        if w_scale is not None:
            scale = scale * tl.load(w_scale + columns, mask=in_columns, other=0.0)[None, :]
        y = y * scale
    else:
        if w_scale is not None:
            scale = tl.load(w_scale + columns, mask=in_columns, other=0.0)
            if X_SCALE == "one":
                scale = scale * tl.load(x_scale)
            y = y * scale[None, :]
        elif X_SCALE == "one":
            y = y * tl.load(x_scale)
    if bias is not None:  # contracts to a fused multiply-add
        y = y + tl.load(bias + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    inside = in_rows[:, None] & in_columns[None, :]
    start, at = first_row.to(tl.int64) * N, lines[:, None] * N + columns[None, :]
    out += start
    if residual is not None:
        y = y + tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)
    if OUT == "float":
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
    elif OUT == "group":
        # Columns beyond N are 0: their scales and bias were.
        scale, inverse, good = dynamic_scale(row_absmax(y, 1))
        tl.store(out + at, dynamic_codes(y, inverse[:, None], good[:, None]), mask=inside)
        group, groups = tl.min(columns, 0) // 128, tl.cdiv(N, 128)
        tl.store(group_scales + first_row.to(tl.int64) * groups + (lines * groups + group), scale, mask=in_rows)
    else:
        if OUT == "channel":
            inverse, _ = static_scale(tl.load(out_scale + columns, mask=in_columns, other=1.0))
            code = round_half_even(y * inverse[None, :])
        else:
            inverse, _ = static_scale(tl.load(out_scale))
            code = round_half_even(y * inverse)
        if out_zero is not None:
            code = code + tl.load(out_zero)
        # An infinite inverse times 0 is NaN, which is not equal to itself.
        good = is_finite(y) & (code == code)
        code = tl.where(good, tl.minimum(tl.maximum(code, -127.0), 127.0), 0.0)
        tl.store(out + at, code.to(tl.int8), mask=inside)


@triton.jit
def write_tile(
    acc,
    first_row,
    first,
    M,
    N,
    x_scale,
    w_scale,
    bias,
    residual,
    out,
    out_scale,
    out_zero,
    group_scales,
    X_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT: tl.constexpr,
):
    """`write` for the columns from `first` on; 256 of them as two halves, so that fewer values are alive at once."""
    WIDTH: tl.constexpr = acc.shape[1]
    PART: tl.constexpr = 128 if WIDTH == 256 else WIDTH
    if WIDTH == 256:
        parts = acc.reshape(acc.shape[0], 2, 128).permute(0, 2, 1).split()
    else:
        parts = (acc,)
    for start in tl.static_range(0, WIDTH, PART):
        write(
            parts[start // PART],
            first_row,
            first + start + tl.arange(0, PART),
            M,
            N,
            x_scale,
            w_scale,
            bias,
            residual,
            out,
            out_scale,
            out_zero,
            group_scales,
            X_SCALE,
            ACTIVATION,
            OUT,
        )


@triton.jit
def store_partial(partial, acc, part, rows, columns, M, N):
    """A tile of one part's sums into `[parts, M, N]`. K is split where tiles are few: M * N is small."""
    at = rows[:, None] * N + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(partial + part * (M.to(tl.int64) * N) + at, acc, mask=inside)


@triton.jit(do_not_specialize=["M"])
def combine_kernel(
    partial,
    x_scale,
    w_scale,
    bias,
    residual,
    out,
    out_scale,
    out_zero,
    group_scales,
    M,
    N,
    X_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Adds the sums of SPLIT parts of K, `[SPLIT, M, N]`, in their order, and finishes 128 columns of BLOCK_M rows."""
    first_row = tl.program_id(1) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * 128 + tl.arange(0, 128)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = rows[:, None] * N + columns[None, :]
    size = M.to(tl.int64) * N
    acc = tl.load(partial + at, mask=inside, other=0)
    for part in tl.static_range(1, SPLIT):
        acc += tl.load(partial + part * size + at, mask=inside, other=0)
    write(
        acc,
        first_row,
        columns,
        M,
        N,
        x_scale,
        w_scale,
        bias,
        residual,
        out,
        out_scale,
        out_zero,
        group_scales,
        X_SCALE,
        ACTIVATION,
        OUT,
    )


@dataclass
class Ending:
    """An `Epilogue` as the kernels of both linear ops take it, and the op's result."""

    result: Any
    rows: int
    columns: int
    arguments: dict[str, Any]
    constants: dict[str, Any]

    @property
    def kind(self) -> str:
        """What leaves, as `write` calls it."""
        return self.constants["OUT"]

    @staticmethod
    def of(epilogue: Epilogue, lead: torch.Size, n: int, device: torch.device, out: Any) -> Ending:
        """For results of `lead` rows and n outputs, in `out` where it is given."""
        out = epilogue.allocate(lead, n, device) if out is None else out
        codes, group_scales = out if epilogue.out_group is not None else (out, None)
        kind = "float"
        if epilogue.out_group is not None:
            kind = "group"
        elif epilogue.out_scale is not None:
            kind = "channel" if epilogue.out_scale.dim() else "tensor"
        arguments = {
            "bias": epilogue.bias,
            "residual": None if epilogue.residual is None else epilogue.residual.contiguous(),
            "out": codes,
            "out_scale": epilogue.out_scale,
            "out_zero": epilogue.out_zero_point,
            "group_scales": group_scales,
        }
        return Ending(out, lead.numel(), n, arguments, {"ACTIVATION": epilogue.activation, "OUT": kind})

    def combine(self, partial: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, kind: str | None) -> None:
        """Finish from the sums of parts of K, `[parts, M, N]`."""
        block = 8
        grid = (ceil_div(self.columns, GROUP), ceil_div(self.rows, block))
        with on(partial):
            combine_kernel[grid](
                partial=partial,
                x_scale=x_scale,
                w_scale=w_scale,
                **self.arguments,
                M=self.rows,
                N=self.columns,
                X_SCALE=kind,
                **self.constants,
                SPLIT=partial.shape[0],
                BLOCK_M=block,
                num_warps=4,
            )


def linear_limits(x: Tensor, x_scale: Tensor | None, weight: Int8Weight | Int4Weight, *_: Any, **__: Any) -> str | None:
    """What neither linear op takes, worded to follow "the triton backend"."""
    n, k = weight.shape
    counts = {"rows": x.numel() // k, "the results of 256 rows": 256 * n, "the groups of a weight": n * ceil_div(k, 32)}
    return uncountable(counts)


def scale_kind(x: Tensor, x_scale: Tensor | None) -> str | None:
    """How activations are scaled: by "one" number, one a "row", one a "group" of 128 of a row, or not (None)."""
    if x_scale is None:
        return None
    if x_scale.dim() == x.dim():
        return "group"
    return "row" if x_scale.dim() else "one"


def aligned_rows(x: Tensor, k: int) -> Tensor:
    """x as `[M, K]` whose rows start at 16 bytes: K padded with zeros to a multiple of 16 where it is none."""
    rows = x.reshape(-1, k)
    if k % 16:
        return torch.nn.functional.pad(rows, (0, -k % 16))
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


@dataclass(frozen=True)
class Variant:
    """An epilogue to compile ahead of time: types of what is given, None for what is not."""

    name: str
    x_scale: str | None
    activation: str | None
    out: str
    out_type: str
    bias: str | None = "*fp32"
    residual: str | None = None
    zero: bool = False

    @property
    def out_bytes(self) -> int:
        return {"*fp32": 4, "*bf16": 2, "*fp16": 2, "*i8": 1}[self.out_type]

    def signature(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Types of pointer arguments, and constants, of `write` by name."""
        pointers = {
            "bias": self.bias,
            "residual": self.residual,
            "out": self.out_type,
            "out_scale": "*fp32" if self.out in ("tensor", "channel") else None,
            "out_zero": "*fp32" if self.zero else None,
            "group_scales": "*fp32" if self.out == "group" else None,
        }
        given = {name: kind for name, kind in pointers.items() if kind is not None}
        absent = {name: None for name, kind in pointers.items() if kind is None}
        return given, {**absent, "ACTIVATION": self.activation, "OUT": self.out}


#: Every branch of the epilogue at least once; the first is the plainest.
VARIANTS = [
    Variant("bf16", "row", None, "float", "*bf16", bias="*bf16"),
    Variant("gelu-groups", "row", "gelu", "group", "*i8"),
    Variant("grouped-residual", "group", None, "float", "*fp32", residual="*bf16"),
    Variant("tanh-channel", "row", "gelu_tanh", "channel", "*i8", zero=True),
    Variant("quick-tensor", "one", "quick_gelu", "tensor", "*i8", bias=None, residual="*fp16"),
]


def combine_cases() -> list[AotCase]:
    """The second kernel of a split K: whole or float sums, both alignments."""
    cases = []
    for variant, sums, aligned in (
        (VARIANTS[0], "*i32", True),
        (VARIANTS[1], "*fp32", True),
        (VARIANTS[0], "*i32", False),
    ):
        pointers, constants = variant.signature()
        signature = {"partial": sums, "x_scale": "*fp32", "w_scale": "*fp32", **pointers}
        cases.append(
            AotCase(
                name=f"combine-{variant.name}-{sums[1:]}" + ("" if aligned else "-odd"),
                kernel=combine_kernel,
                signature={**signature, "M": "i32", "N": "i32"},
                constexprs={**constants, "X_SCALE": variant.x_scale, "SPLIT": 8, "BLOCK_M": 8},
                divisible=(*signature, *(["N"] if aligned else [])),
                options={"num_warps": 4},
                contains=dict.fromkeys((80, 90), ("LDG.E.128",) if aligned else ()),
                forbids=("LDG.E.U8", "STS.U8"),
            )
        )
    return cases
