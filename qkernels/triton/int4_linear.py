"""INT4 linear maps: float (W4A16) or int8 (W4A8) `[M, K]` times `[N, K]` weights of 4 bits in groups.

A step takes 64 bytes of a weight row, the two halves of 128 codes (layout `halves128`), or 32 where groups are 32 wide:
two products, one with the low and one with the high nibbles, without any interleaving. Nibbles become operands by bits:

    W4A8   `byte << 4` and `byte & 0xF0` are 16 * (code - 8) as int8; the 16 goes into the group's scale.
    W4A16  `nibble ^ 0x4308` is 128 + code as bfloat16, `nibble ^ 0x6408` is 1024 + code as float16 (nibbles hold
           code ^ 8); subtracting leaves code - 8, exactly. Float32 x multiplies in three TF32 products.

Operands are whole numbers, so nothing is rounded before the scale: sums of a group are int32 or float32, and are scaled
into a float32 sum where a group ends. A zero point other than 8 subtracts `scale * (zero - 8) * sum of x` of the group.
Weights are the left operand where rows are few: then they go from registers into tensor cores.

Bound: for few rows the weights' way from memory (4.125 bits per weight at groups of 128), else tensor cores.

One file, long as it is: W4A8 and W4A16 are one kernel, whose configurations and compiled cases belong to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels.contract import NO_EPILOGUE, Epilogue
from qkernels.weights import Int4Weight

from . import interpreted, tune
from .aot import AotCase
from .epilogue import (
    VARIANTS,
    Ending,
    Variant,
    aligned_rows,
    linear_limits,
    scale_kind,
    store_partial,
    tile_of,
    write_tile,
)
from .launch import SM80, SM90, Chip, ceil_div, chip, on

_HALF: tl.constexpr = tl.constexpr(0x6408)  # 1024, in float16
_BRAIN: tl.constexpr = tl.constexpr(0x4308)  # 128, in bfloat16
_SINGLE: tl.constexpr = tl.constexpr(0x4B000008)  # 2^23, in float32


@triton.jit
def low_nibbles(packed, X_TYPE: tl.constexpr):
    """Packed bytes -> operands of the type of x: code - 8, or 16 times that for int8."""
    if X_TYPE == "i8":
        return (packed << 4).to(tl.int8, bitcast=True)
    else:
        return whole(packed & 0xF, X_TYPE)


@triton.jit
def high_nibbles(packed, X_TYPE: tl.constexpr):
    if X_TYPE == "i8":
        return (packed & 0xF0).to(tl.int8, bitcast=True)
    else:
        return whole(packed >> 4, X_TYPE)


@triton.jit
def whole(nibble, X_TYPE: tl.constexpr):
    """`code ^ 8` -> code - 8 in a float type: the bits of a power of two, 8 and the nibble by exclusive or are its sum
    with the code."""
    if X_TYPE == "fp16":
        return (nibble.to(tl.int16) ^ _HALF).to(tl.float16, bitcast=True) - 1032.0
    elif X_TYPE == "bf16":
        return (nibble.to(tl.int16) ^ _BRAIN).to(tl.bfloat16, bitcast=True) - 136.0
    else:
        return (nibble.to(tl.int32) ^ _SINGLE).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def product(a, b, acc, SWAP: tl.constexpr):
    """`acc + a b^T` for rows a and weights b, or its transpose with SWAP."""
    if a.dtype == tl.int8:
        return tl.dot(b, a.T, acc, out_dtype=tl.int32) if SWAP else tl.dot(a, b.T, acc, out_dtype=tl.int32)
    elif a.dtype == tl.float32:
        if SWAP:
            return tl.dot(b, a.T, acc, input_precision="tf32x3")
        else:
            return tl.dot(a, b.T, acc, input_precision="tf32x3")
    else:
        return tl.dot(b, a.T, acc) if SWAP else tl.dot(a, b.T, acc)


@triton.jit
def fold(
    scaled,
    sums,
    total,
    rows,
    columns,
    M,
    N,
    K,
    k,
    scales,
    zeros,
    x_scale,
    groups,
    x_groups,
    group,
    factor,
    X_SCALE: tl.constexpr,
    SWAP: tl.constexpr,
):
    """`scaled + sums * scale` (less the zero's part) for the group of K that k lies in; beyond K there is none."""
    at = columns * groups + k // group
    inside = (columns < N) & (k < K)
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    value = sums.to(tl.float32)
    scale_w = scale * factor
    value = value * (scale_w[:, None] if SWAP else scale_w[None, :])
    if zeros is not None:
        lift = (tl.load(zeros + at, mask=inside, other=8.0).to(tl.float32) - 8.0) * scale
        if SWAP:
            value -= lift[:, None] * total[None, :]
        else:
            value -= lift[None, :] * total[:, None]
    if X_SCALE == "group":
        of_x = tl.load(x_scale + rows.to(tl.int64) * x_groups + k // 128, mask=(rows < M) & (k < K), other=0.0)
        value = value * (of_x[None, :] if SWAP else of_x[:, None])
    return scaled + value


@triton.jit(do_not_specialize=["M"])
def int4_linear_kernel(
    x,
    w,
    scales,
    zeros,
    x_scale,
    bias,
    residual,
    out,
    out_scale,
    out_zero,
    group_scales,
    partial,
    M,
    N,
    K,
    x_stride,
    GROUP: tl.constexpr,
    X_TYPE: tl.constexpr,
    X_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SWAP: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    BAND: tl.constexpr,
):
    """x: pointer to `[M, x_stride]`, of which K count, or a TMA descriptor; w: pointer to, or descriptor of, bytes
    `[N, Kp / 2]`, Kp = K padded to 128. GROUP: 32, 64, 128, or 0 for one group of all K. X_TYPE: "i8", "fp32", "bf16"
    or "fp16". With SPLIT > 1 sums go to `partial`, float32 `[SPLIT, M, N]`, and nothing else is written."""
    BYTES: tl.constexpr = 32 if GROUP == 32 else 64
    # With one group of all K the sums go on through the steps, unless activations have a scale for each 128.
    ONCE: tl.constexpr = GROUP == 0 and X_SCALE != "group"
    factor: tl.constexpr = 0.0625 if X_TYPE == "i8" else 1.0
    kind: tl.constexpr = tl.int32 if X_TYPE == "i8" else tl.float32
    blocks = tl.cdiv(K, 128)
    share = tl.cdiv(blocks, SPLIT)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    group = K if GROUP == 0 else GROUP
    groups, x_groups = tl.cdiv(K, group), blocks
    for index in tl.range(tl.program_id(0), tiles * SPLIT, tl.num_programs(0)):
        part = index // tiles
        row_tile, column_tile = tile_of(index % tiles, M, N, BLOCK_M, BLOCK_N, BAND)
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if not TMA:
            x_rows = x + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * x_stride
            w_rows = w + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * (blocks * 64)
        scaled = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
        zero = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), kind)
        sums = zero
        total = tl.zeros((BLOCK_M,), tl.float32)
        first, last = part * share, tl.minimum(part * share + share, blocks)
        for step in tl.range(first * (64 // BYTES), last * (64 // BYTES)):
            # Sums of multiples, so that the compiler sees how far k is aligned.
            k = step * 128 if BYTES == 64 else step // 2 * 128 + step % 2 * 32
            if TMA:
                packed = w.load([column_tile * BLOCK_N, step * BYTES])
                low = x.load([row_tile * BLOCK_M, k])
                high = x.load([row_tile * BLOCK_M, k + 64])
            else:
                at = tl.arange(0, BYTES)
                packed = tl.load(w_rows + (step * BYTES + at)[None, :])
                low = tl.load(x_rows + (k + at)[None, :], mask=(k + at < x_stride)[None, :], other=0)
                high = tl.load(x_rows + (k + 64 + at)[None, :], mask=(k + 64 + at < x_stride)[None, :], other=0)
            if X_TYPE == "fp32":
                low, high = low.to(tl.float32), high.to(tl.float32)
            w_low, w_high = low_nibbles(packed, X_TYPE), high_nibbles(packed, X_TYPE)
            low_sum, high_sum = total, total
            if zeros is not None:
                low_sum = tl.sum(low.to(tl.float32), 1)
                high_sum = tl.sum(high.to(tl.float32), 1)
            if ONCE:
                sums = product(high, w_high, product(low, w_low, sums, SWAP), SWAP)
                total += low_sum + high_sum
            elif BYTES == 32 or GROUP == 64:
                scaled = fold(
                    scaled,
                    product(low, w_low, zero, SWAP),
                    low_sum,
                    rows,
                    columns,
                    M,
                    N,
                    K,
                    k,
                    scales,
                    zeros,
                    x_scale,
                    groups,
                    x_groups,
                    group,
                    factor,
                    X_SCALE,
                    SWAP,
                )
                scaled = fold(
                    scaled,
                    product(high, w_high, zero, SWAP),
                    high_sum,
                    rows,
                    columns,
                    M,
                    N,
                    K,
                    k + 64,
                    scales,
                    zeros,
                    x_scale,
                    groups,
                    x_groups,
                    group,
                    factor,
                    X_SCALE,
                    SWAP,
                )
            else:
                both = product(high, w_high, product(low, w_low, zero, SWAP), SWAP)
                scaled = fold(
                    scaled,
                    both,
                    low_sum + high_sum,
                    rows,
                    columns,
                    M,
                    N,
                    K,
                    k,
                    scales,
                    zeros,
                    x_scale,
                    groups,
                    x_groups,
                    group,
                    factor,
                    X_SCALE,
                    SWAP,
                )
        if ONCE:
            scaled = fold(
                scaled,
                sums,
                total,
                rows,
                columns,
                M,
                N,
                K,
                0,
                scales,
                zeros,
                x_scale,
                groups,
                x_groups,
                group,
                factor,
                X_SCALE,
                SWAP,
            )
        acc = scaled.T if SWAP else scaled
        if SPLIT > 1:
            store_partial(partial, acc, part, rows, columns, M, N)
        else:
            write_tile(
                acc,
                row_tile * BLOCK_M,
                column_tile * BLOCK_N,
                M,
                N,
                x_scale,
                None,
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


X_TYPES = {torch.int8: "i8", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BYTES_OF = {"i8": 1, "bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Config:
    """A tile of `block_m` rows by `block_n` columns; a step is 128 of K."""

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 3
    swap: bool = True
    split: int = 1
    per_sm: int = 2

    def legal(self, chip: Chip, x_type: str, out: str) -> bool:
        """Whether it compiles without spills (Triton 3.6 and 3.8) and fits into shared memory."""
        stage = self.block_m * 128 * BYTES_OF[x_type] + self.block_n * 64
        if out == "group" and self.block_n != 128:
            return False
        # A thread holds the sum of a group beside the scaled sum, and more for the three products of float32.
        held = 2 * self.block_m * self.block_n // (32 * self.warps)
        return self.stages * stage <= chip.shared and held <= (16 if x_type == "fp32" else 64)


def candidates(chip: Chip) -> list[Config]:
    """All configurations that are ever chosen on this chip."""
    narrow = [Config(m, 64, 4, 4, per_sm=4) for m in (16, 32)]
    wide = [Config(m, 128, 8, 4) for m in (16, 32)]
    return [*narrow, *wide, Config(64, 128, 8)]


def configure(m: int, n: int, k: int, chip: Chip, x_type: str, out: str) -> Config:
    """The smallest tile that holds all rows, or the largest that fills the chip; split along K where tiles are few.

    No figure here was measured on a GPU.
    """
    legal = [config for config in candidates(chip) if config.legal(chip, x_type, out)]

    def tiles(config: Config) -> int:
        return ceil_div(m, config.block_m) * ceil_div(n, config.block_n)

    largest = max(config.block_m for config in legal)
    height = min((config.block_m for config in legal if config.block_m >= m), default=largest)
    fitting = [config for config in legal if config.block_m == height]
    filling = [config for config in fitting if tiles(config) >= chip.multiprocessors]
    best = filling[-1] if filling else fitting[0]
    # Each part keeps at least eight steps: a second kernel costs about as much as that.
    blocks = ceil_div(k, 128)
    split = min(2 * chip.multiprocessors // tiles(best), blocks // 8, 8)
    # No part is empty.
    return replace(best, split=ceil_div(blocks, ceil_div(blocks, split))) if split > 1 else best


int4_linear_limits = linear_limits


def int4_linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Int4Weight,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.int4_linear`. The weight must be in layout `halves128`."""
    n, k = weight.shape
    end = Ending.of(epilogue, x.shape[:-1], n, x.device, out)
    if end.rows == 0:
        return end.result
    rows, kind, x_type, on_chip = aligned_rows(x, k), scale_kind(x, x_scale), X_TYPES[x.dtype], chip(x.device)

    def run(config: Config) -> None:
        launch(config, rows, weight, x_scale, kind, end)

    def legal() -> list[Config]:
        return [config for config in candidates(on_chip) if config.legal(on_chip, x_type, end.kind)]

    shape, kinds = (end.rows, n, k), (x_type, kind, weight.group, end.kind)
    rule = configure(*shape, on_chip, x_type, end.kind)
    run(tune.choose("int4_linear", x.device, shape, kinds, rule, legal, run))
    return end.result


def launch(
    config: Config, x: Tensor, weight: Int4Weight, x_scale: Tensor | None, kind: str | None, end: Ending
) -> None:
    """Run one configuration: x `[M, K or more]`, rows at multiples of 16 bytes, zeros beyond K."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (n, k), (m, stride), on_chip = weight.shape, x.shape, chip(x.device)
    partial = None if config.split == 1 else torch.empty(config.split, m, n, dtype=torch.float32, device=x.device)
    tma, group = on_chip.capability >= 90, 0 if weight.group == k else weight.group
    codes = weight.codes.contiguous()
    operands: tuple[Any, Any] = (x, codes)
    if tma:
        wide = _bytes(group)
        blocks = ([config.block_m, wide], [config.block_n, wide])
        operands = tuple(TensorDescriptor.from_tensor(t, b) for t, b in zip((x, codes), blocks, strict=True))
    tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n) * config.split
    with on(x):
        int4_linear_kernel[(min(tiles, on_chip.multiprocessors * config.per_sm),)](
            x=operands[0],
            w=operands[1],
            scales=weight.scales.contiguous(),
            zeros=None if weight.zeros is None else weight.zeros.contiguous(),
            x_scale=x_scale,
            **end.arguments,
            partial=partial,
            M=m,
            N=n,
            K=k,
            x_stride=stride,
            GROUP=group,
            # The interpreter cannot compute with bfloat16, but convert it.
            X_TYPE="fp32" if interpreted() and x.dtype == torch.bfloat16 else X_TYPES[x.dtype],
            X_SCALE=kind,
            **end.constants,
            **_constants(config, tma),
        )
    if partial is not None:
        end.combine(partial, x_scale, None, None if kind == "group" else kind)


def _bytes(group: int) -> int:
    return 32 if group == 32 else 64


def _constants(config: Config, tma: bool) -> dict[str, Any]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "SWAP": config.swap,
        "SPLIT": config.split,
        "TMA": tma,
        "BAND": 8,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def aot_cases() -> list[AotCase]:
    """Every configuration for W4A8 and W4A16 at groups of 128; other groups, zeros, types and epilogues once."""
    cases = []
    for target in (SM80, SM90):
        for config in candidates(target):
            for x_type in ("i8", "bf16"):
                cases.append(_case(config, VARIANTS[0], target, x_type))
        small, large = candidates(target)[0], candidates(target)[-1]
        for group in (0, 32, 64):
            cases.append(_case(large, VARIANTS[0], target, "i8", group))
            cases.append(_case(small, VARIANTS[0], target, "bf16", group))
        cases.append(_case(large, VARIANTS[0], target, "fp16", zeros=True))
        cases.append(_case(small, VARIANTS[0], target, "i8", zeros=True))
        cases.append(_case(small, VARIANTS[0], target, "fp32"))
        cases.append(_case(candidates(target)[2], VARIANTS[1], target, "fp32"))
        cases.append(_case(replace(small, split=4), VARIANTS[0], target, "bf16"))
        cases.append(_case(large, VARIANTS[0], target, "i8", aligned=False))
        for variant in VARIANTS[1:]:
            cases.append(_case(large, variant, target, "i8"))
    return cases


def _case(
    config: Config,
    variant: Variant,
    target: Chip,
    x_type: str,
    group: int = 128,
    zeros: bool = False,
    aligned: bool = True,
) -> AotCase:
    tma, wide = target.capability >= 90, _bytes(group)
    pointers, constants = variant.signature()
    if tma:
        operands = [f"tensordesc<{x_type}[{config.block_m},{wide}]>", f"tensordesc<u8[{config.block_n},{wide}]>"]
    else:
        operands = [f"*{x_type}", "*u8"]
    signature = {"x": operands[0], "w": operands[1], "scales": "*fp16", **pointers}
    optional = {
        "zeros": "*fp16" if zeros else None,
        "x_scale": "*fp32" if x_type == "i8" else None,
        "partial": "*fp32" if config.split > 1 else None,
    }
    signature |= {name: kind for name, kind in optional.items() if kind}
    constants |= {name: None for name, kind in optional.items() if not kind}
    constants["X_SCALE"] = variant.x_scale if x_type == "i8" else None
    options = _constants(config, tma)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    divisible = [name for name in signature if not signature[name].startswith("tensordesc")]
    shape = f"{config.block_m}x{config.block_n}-{warps}w{stages}s" + f"-split{config.split}" * (config.split > 1)
    form = f"g{group or 'K'}" + "-zeros" * zeros + ("" if aligned else "-odd")
    dots = {"i8": ("IGMMA", "IMMA"), "fp32": ("HGMMA", "HMMA"), "bf16": ("HGMMA", "HMMA"), "fp16": ("HGMMA", "HMMA")}
    return AotCase(
        name=f"int4_linear-{x_type}-{form}-{variant.name}-{shape}",
        kernel=int4_linear_kernel,
        signature={**signature, "M": "i32", "N": "i32", "K": "i32", "x_stride": "i32"},
        constexprs={**constants, "GROUP": group, "X_TYPE": x_type, **options},
        divisible=(*divisible, "x_stride", *(["N", "K"] if aligned else [])),
        options={"num_warps": warps, "num_stages": stages},
        contains={80: (dots[x_type][1], "LDGSTS"), 90: (dots[x_type][0], "UTMALDG")},
        forbids=("LDG.E.U8", "STS.U8"),
        capabilities=(target.capability,),
    )
