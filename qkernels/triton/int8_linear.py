"""INT8 linear maps: `[M, K]` int8 codes times `[N, K]` int8 weights, in int32 on tensor cores, with the epilogue fused.

Both operands have K contiguous, as integer tensor cores want them. Programs go round tiles of the output (persistent),
in groups of row tiles that share weights in L2. On Hopper tiles of operands come by TMA from host descriptors, else by
asynchronous copies. Few rows make weights the left operand (see epilogue.py); few tiles with a long K split it among
programs, whose int32 sums a second kernel adds in order. Where activations have a scale for 128 inputs each, the int32
sum of every step of 128 is scaled into a float32 sum.

Bound: tensor cores for many rows (4096 products per clock and SM on sm_90), else the weights' way from memory. One
output costs K/4096 clocks there, so for short K the epilogue takes as long as the products, and something must run
beside it: two blocks per SM finish and multiply in turn, or, where a tile takes all of a SM, the loops over tiles and K
are one loop ("flatten"), in which the next tile's operands arrive while a tile is finished. Triton waits for every
integer product before it starts the next one (it leaves only float32 sums in flight); larger tiles and second blocks
hide part of that wait.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qkernels.contract import NO_EPILOGUE, Epilogue
from qkernels.weights import Int8Weight

from . import tune
from .aot import AotCase
from .epilogue import (
    VARIANTS,
    Ending,
    Variant,
    aligned_rows,
    combine_cases,
    linear_limits,
    scale_kind,
    store_partial,
    tile_of,
    write_tile,
)
from .launch import SM80, SM90, Chip, ceil_div, chip, on


@triton.jit(do_not_specialize=["M"])
def int8_linear_kernel(
    x,
    w,
    x_scale,
    w_scale,
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
    X_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    BAND: tl.constexpr,
):
    """x and w: pointers to `[M, K]` and `[N, K]`, K a multiple of 16, or TMA descriptors of them. With SPLIT > 1 sums
    go to `partial`, `[SPLIT, M, N]`, and nothing else is written."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(steps, SPLIT)
    groups = tl.cdiv(K, 128)
    for index in tl.range(tl.program_id(0), tiles * SPLIT, tl.num_programs(0), flatten=FLATTEN):
        part = index // tiles
        row_tile, column_tile = tile_of(index % tiles, M, N, BLOCK_M, BLOCK_N, BAND)
        lines = tl.arange(0, BLOCK_M)
        rows = row_tile * BLOCK_M + lines
        if not TMA:
            columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            # Rows beyond the end read the last one: no mask, and nothing is stored of them.
            x_rows = x + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * K
            w_rows = w + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K
        sums = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.int32)
        if X_SCALE == "group":
            scaled = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
            x_scales = x_scale + (row_tile * BLOCK_M).to(tl.int64) * groups + lines * groups
        # Bounds that no tile changes, where K is whole: else Triton does not flatten the loops.
        begin = part * share if SPLIT > 1 else 0
        end = tl.minimum(begin + share, steps) if SPLIT > 1 else steps
        for step in tl.range(begin, end):
            if TMA:
                a = x.load([row_tile * BLOCK_M, step * BLOCK_K])
                b = w.load([column_tile * BLOCK_N, step * BLOCK_K])
            else:
                k = step * BLOCK_K + tl.arange(0, BLOCK_K)
                a = tl.load(x_rows + k[None, :], mask=(k < K)[None, :], other=0)
                b = tl.load(w_rows + k[None, :], mask=(k < K)[None, :], other=0)
            if X_SCALE == "group":
                product = tl.dot(b, a.T, out_dtype=tl.int32) if SWAP else tl.dot(a, b.T, out_dtype=tl.int32)
                scale = tl.load(x_scales + step * BLOCK_K // 128, mask=rows < M, other=0.0)
                scaled += product.to(tl.float32) * (scale[None, :] if SWAP else scale[:, None])
            elif SWAP:
                sums = tl.dot(b, a.T, sums, out_dtype=tl.int32)
            else:
                sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
        acc = scaled if X_SCALE == "group" else sums
        if SWAP:
            acc = acc.T
        first = column_tile * BLOCK_N
        if SPLIT > 1:
            store_partial(partial, acc, part, rows, first + tl.arange(0, BLOCK_N), M, N)
        else:
            write_tile(
                acc,
                row_tile * BLOCK_M,
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
                X_SCALE,
                ACTIVATION,
                OUT,
            )


@dataclass(frozen=True)
class Config:
    """A tile of `block_m` rows by `block_n` columns, `block_k` deep per step; blocks that a SM holds at once."""

    block_m: int
    block_n: int
    block_k: int = 128
    warps: int = 4
    stages: int = 3
    swap: bool = False
    split: int = 1
    per_sm: int = 1

    def flat(self, chip: Chip) -> bool:
        """Whether the next tile's operands are on their way while a tile is finished. Two blocks per SM do that for
        each other, and leave no shared memory for it."""
        return chip.capability >= 90 and self.per_sm == 1 and self.split == 1

    def legal(self, chip: Chip, x_scale: str | None, out: str, out_bytes: int) -> bool:
        """Whether it compiles without spills (Triton 3.6 and 3.8) and fits into shared memory. `out`: what leaves, as
        `epilogue.write` calls it, of `out_bytes` per value."""
        shared = self.per_sm * self.stages * (self.block_m + self.block_n) * self.block_k
        if self.flat(chip):  # values change threads beside the operands: 128 columns at a time, sums if transposed
            shared += self.block_m * min(self.block_n, 128) * (4 if self.swap else out_bytes)
        if out == "group" and self.block_n % 128 or x_scale == "group" and self.block_k != 128:
            return False
        # Accumulators per thread: two sets where activations have groups. Triton 3.8 holds int8 fragments on sm_80.
        held = self.block_m * self.block_n // (32 * self.warps) * (2 if x_scale == "group" else 1)
        # Static codes need more registers; by one scale, a tile 256 wide is finished in halves.
        narrow = out == "channel" or out == "tensor" and self.block_n < 256
        return shared <= chip.shared and held <= (64 if chip.capability < 90 or narrow else 128)


def candidates(chip: Chip) -> list[Config]:
    """All configurations that are ever chosen on this chip."""
    if chip.capability >= 90:
        few = [Config(m, 64, 128, 4, 4, swap=True, per_sm=2) for m in (16, 32, 64)]
        grouped = [Config(m, 128, 128, 4, 4, swap=True) for m in (16, 32, 64)]
        many = [
            Config(128, 256, 128, 8, 4),
            Config(128, 256, 128, 8, 3),
            Config(128, 128, 128, 4, 3, per_sm=2),
            Config(64, 128, 128, 4, 4, per_sm=2),
        ]
        return [*few, *grouped, *many, Config(128, 128, 128, 8, 4)]
    few = [Config(m, 64, 128, 4, 4, swap=True) for m in (16, 32)] + [
        Config(m, 128, 128, 8, 3, swap=True) for m in (16, 32)
    ]
    return [*few, Config(64, 128, 64, 4, 4, per_sm=2), Config(128, 128, 64, 8, 4), Config(64, 128, 128, 8, 3)]


def configure(m: int, n: int, k: int, chip: Chip, x_scale: str | None, out: str, out_bytes: int) -> Config:
    """The configuration for a shape: the legal tile with the least estimated time, split along K where tiles are few.

    A tile takes its products at the rate of its kind (small tiles load more per operation), and for each output an
    epilogue as dear as 256 products, which is hidden where a SM holds two blocks. No figure here was measured on a GPU.
    """
    steps = ceil_div(k, 128)

    def time(config: Config) -> float:
        tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
        area = config.block_m * config.block_n
        rate = area / (area + 48 * (config.block_m + config.block_n))
        work = area * (k / rate + (256 if config.per_sm == 1 else 64))
        return ceil_div(tiles, chip.multiprocessors) * work

    legal = [config for config in candidates(chip) if config.legal(chip, x_scale, out, out_bytes)]
    best = min(legal, key=time)
    tiles = ceil_div(m, best.block_m) * ceil_div(n, best.block_n)
    # Each part keeps at least eight steps: a second kernel costs about as much as that.
    split = min(chip.multiprocessors // tiles, steps // 8, 8) if 2 * tiles <= chip.multiprocessors else 1
    # No part is empty.
    return replace(best, split=ceil_div(steps, ceil_div(steps, split))) if split > 1 else best


int8_linear_limits = linear_limits


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Int8Weight,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.int8_linear`. The weight must be in layout `rows16`."""
    n, k = weight.shape
    end = Ending.of(epilogue, x.shape[:-1], n, x.device, out)
    if end.rows == 0:
        return end.result
    kind, rows, codes = scale_kind(x, x_scale), aligned_rows(x, k), weight.codes.contiguous()
    leaves = (end.kind, end.arguments["out"].itemsize)
    shape, on_chip = (end.rows, n, codes.shape[1]), chip(x.device)

    def run(config: Config) -> None:
        launch(config, rows, codes, x_scale, weight.scales.contiguous(), kind, end)

    def legal() -> list[Config]:
        return [config for config in candidates(on_chip) if config.legal(on_chip, kind, *leaves)]

    rule = configure(*shape, on_chip, kind, *leaves)
    run(tune.choose("int8_linear", x.device, shape, (kind, *leaves), rule, legal, run))
    return end.result


def launch(
    config: Config, x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, kind: str | None, end: Ending
) -> None:
    """Run one configuration: x int8 `[M, K]` and w int8 `[N, K]`, rows at multiples of 16 bytes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), n, on_chip = x.shape, w.shape[0], chip(x.device)
    partial = None
    if config.split > 1:
        sums = torch.float32 if kind == "group" else torch.int32
        partial = torch.empty(config.split, m, n, dtype=sums, device=x.device)
    tma = on_chip.capability >= 90
    operands: tuple[Any, Any] = (x, w)
    if tma:
        blocks = ((config.block_m, config.block_k), (config.block_n, config.block_k))
        operands = tuple(TensorDescriptor.from_tensor(t, list(b)) for t, b in zip((x, w), blocks, strict=True))
    tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n) * config.split
    with on(x):
        int8_linear_kernel[(min(tiles, on_chip.multiprocessors * config.per_sm),)](
            x=operands[0],
            w=operands[1],
            x_scale=x_scale,
            w_scale=w_scale,
            **end.arguments,
            partial=partial,
            M=m,
            N=n,
            K=k,
            X_SCALE=kind,
            **end.constants,
            **_constants(config, on_chip),
        )
    if partial is not None:
        end.combine(partial, x_scale, w_scale, None if kind == "group" else kind)


def _constants(config: Config, chip: Chip) -> dict[str, Any]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SWAP": config.swap,
        "SPLIT": config.split,
        "TMA": chip.capability >= 90,
        "FLATTEN": config.flat(chip),
        "BAND": 8,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def aot_cases() -> list[AotCase]:
    """Every configuration with the plainest epilogue, and every epilogue with the main configuration of its kind."""
    cases = combine_cases()
    for target in (SM80, SM90):
        seen = set()
        for variant in VARIANTS:
            for config in candidates(target):
                if not config.legal(target, variant.x_scale, variant.out, variant.out_bytes):
                    continue
                # One configuration of a form is enough for the other epilogues.
                form = (variant.name, config.swap, config.flat(target))
                if variant is not VARIANTS[0] and form in seen:
                    continue
                seen.add(form)
                cases.append(_case(config, variant, target, aligned=True))
        widest = Variant("fp32-residual", "row", None, "float", "*fp32", residual="*fp32")  # most shared memory
        cases += [
            # Triton 3.6: 24 bytes per thread, once per tile
            replace(_case(config, widest, target, aligned=True), spills=frozenset({(90, (3, 6))}))
            for config in candidates(target)
            if config.flat(target) and not config.swap and config.legal(target, "row", "float", 4)
        ]
        cases.append(_case(candidates(target)[-1], VARIANTS[0], target, aligned=False))
        cases.append(_case(replace(candidates(target)[0], split=4), VARIANTS[0], target, aligned=True))
    return cases


def _case(config: Config, variant: Variant, target: Chip, aligned: bool) -> AotCase:
    tma = target.capability >= 90
    pointers, constants = variant.signature()
    blocks = (config.block_m, config.block_n)
    operands = [f"tensordesc<i8[{size},{config.block_k}]>" if tma else "*i8" for size in blocks]
    partial = None if config.split == 1 else "*fp32" if variant.x_scale == "group" else "*i32"
    signature = {"x": operands[0], "w": operands[1], "x_scale": "*fp32", "w_scale": "*fp32", **pointers}
    signature |= {"partial": partial} if partial else {}
    options = _constants(config, target)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    divisible = [name for name in signature if not signature[name].startswith("tensordesc")]
    shape = f"{config.block_m}x{config.block_n}x{config.block_k}-{warps}w{stages}s"
    form = "-swap" * config.swap + (f"-split{config.split}" if config.split > 1 else "") + ("" if aligned else "-odd")
    return AotCase(
        name=f"int8_linear-{variant.name}-{shape}{form}",
        kernel=int8_linear_kernel,
        signature={**signature, "M": "i32", "N": "i32", "K": "i32"},
        constexprs={**constants, **({} if partial else {"partial": None}), "X_SCALE": variant.x_scale, **options},
        divisible=(*divisible, "K", *(["N"] if aligned else [])),
        options={"num_warps": warps, "num_stages": stages},
        contains={80: ("IMMA.16832.S8.S8", "LDGSTS"), 90: ("IGMMA", "UTMALDG")},
        # Where sums were transposed, codes of a small tile change threads as bytes, once per tile.
        forbids=("LDG.E.U8", "STS.U8", *(() if config.swap and variant.out != "float" else ("LDS.U8", "LDS.S8"))),
        capabilities=(target.capability,),
    )
