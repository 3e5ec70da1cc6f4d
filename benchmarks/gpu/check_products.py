"""Checks of the linear maps and of attention: every epilogue, odd N and K, M = 1, corners. Outputs are poisoned."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import qkernels
from qkernels import Int4Weight, Int8Weight

from . import oracle
from .inputs import FLOATS, Case, Inputs, written
from .oracle import require

LINEAR = [
    (1, 768, 768),
    (1, 1, 1),
    (2, 130, 33),
    (16, 3072, 768),
    (17, 1000, 1001),
    (50, 768, 3072),
    (64, 512, 4096),
    (129, 257, 255),
    (257, 1024, 1024),
    (800, 2304, 768),
    (4096, 4096, 1024),
    (12800, 3072, 768),
    (0, 64, 64),
]
TINY_LINEAR = [(1, 1, 1), (1, 33, 40), (17, 130, 150), (0, 16, 16)]
EVERY_OPTION = ((129, 257, 255), (257, 1024, 1024), (17, 130, 150))
#: activation, bias, dtype of the residual, what leaves, form of x's scales
OPTIONS = [
    (None, False, None, torch.float32, "rows"),
    ("gelu", True, None, torch.bfloat16, "rows"),
    (None, True, torch.bfloat16, torch.bfloat16, "rows"),
    ("quick_gelu", True, None, "static", "rows"),
    ("gelu_tanh", True, None, torch.float16, "one"),
    ("gelu", True, None, "group", "rows"),
    (None, True, torch.float32, torch.float32, "groups"),
    (None, True, None, "channels", "one"),
]


def _linear(
    inputs: Inputs, call: Callable[..., Any], exact: Callable[..., tuple[Tensor, Tensor]], m: int, n: int, option: tuple
) -> None:
    """One call with an epilogue. `exact(bias)` is the linear part with its error."""
    activation, has_bias, residual_type, leaves, _ = option
    bias = inputs.randn(n) if has_bias else None
    residual = None if residual_type is None else inputs.randn(m, n, dtype=residual_type)
    value, error = oracle.finish(*exact(bias), activation, residual)
    rest: dict[str, Any] = {"bias": bias, "activation": activation, "residual": residual}
    if leaves == "group":
        codes, scales = inputs.poison(m, n, dtype=torch.int8), inputs.poison(m, -(-n // 128))
        call(**rest, out_group=128, out=(codes, scales))
        written(codes)
        oracle.group_codes(codes, scales, value, error, "codes")
    elif leaves in ("static", "channels"):
        size = float(value.abs().amax()) if value.numel() else 1.0
        step = torch.full((n,) if leaves == "channels" else (), size / 100 + 1e-3, device=inputs.device)
        codes = inputs.poison(m, n, dtype=torch.int8)
        call(**rest, out_scale=step, out_zero_point=2, out=codes)
        written(codes)
        oracle.static_codes(codes, value, error, step, 2, "codes")
    else:
        y = inputs.poison(m, n, dtype=leaves)
        call(**rest, out_dtype=leaves, out=y)
        oracle.near_floats(y, value, error, "values")


def _x_scale(inputs: Inputs, m: int, k: int, form: str) -> tuple[Tensor, Tensor]:
    """As the op takes it, and as `[M]` or `[M, groups]`."""
    if form == "groups":
        scales = inputs.rand(m, -(-k // 128)) * 0.02 + 0.001
        return scales, scales
    if form == "one":
        one = torch.tensor(0.013, device=inputs.device)
        return one, one.expand(m)
    rows = inputs.rand(m) * 0.02 + 0.001
    return rows, rows


def int8_linear(inputs: Inputs) -> Iterator[Case]:
    def check(m: int, n: int, k: int, option: tuple, fill: tuple[int, int] | None = None, view: str = "") -> None:
        x = inputs.codes(m, k) if fill is None else torch.full((m, k), fill[0], dtype=torch.int8, device=inputs.device)
        if view == "columns":
            x = inputs.codes(k, m).T
        elif view == "shifted":
            x = inputs.codes(m, k + 3)[:, 3:]
        weight = Int8Weight.quantize(inputs.randn(n, k))
        if fill is not None:
            weight = Int8Weight(torch.full_like(weight.codes, fill[1]), weight.scales, (n, k))
        given, rows = _x_scale(inputs, m, k, option[4])
        packed = qkernels.pack(weight)
        _linear(
            inputs,
            lambda **rest: qkernels.int8_linear(x, given, packed, **rest),
            lambda bias: oracle.linear8(x, rows, weight.codes, weight.scales, bias),
            m,
            n,
            option,
        )

    for number, shape in enumerate(inputs.shapes(LINEAR, TINY_LINEAR)):
        # Every epilogue at an even and at an odd shape; elsewhere two, since compiling takes longer than running.
        options = OPTIONS if shape in EVERY_OPTION else [OPTIONS[number % 8], OPTIONS[(number + 3) % 8]]
        for option in options:
            yield f"{shape} {option}", lambda s=shape, o=option: check(*s, o)
    for fill in itertools.product((-127, 127), repeat=2):
        shape = (17, 33, 200 if inputs.tiny else 4096)
        yield f"corner {fill}", lambda f=fill, s=shape: check(*s, OPTIONS[0], f)
    for view in ("columns", "shifted"):
        yield view, lambda v=view: check(33, 40, 96, OPTIONS[1], view=v)

    def bad_row() -> None:
        weight, scale = qkernels.pack(Int8Weight.quantize(inputs.randn(40, 64))), inputs.rand(5)
        scale[3] = float("nan")
        y = qkernels.int8_linear(inputs.codes(5, 64), scale, weight)
        require(y.isnan().all(1).tolist() == [False, False, False, True, False], "a NaN scale must give a NaN row")

    yield "NaN scale", bad_row


def int4_linear(inputs: Inputs) -> Iterator[Case]:
    def check(m: int, n: int, k: int, group: int, symmetric: bool, kind: torch.dtype, option: tuple) -> None:
        group = min(group, k)
        weight = Int4Weight.quantize(inputs.randn(n, k), group, symmetric=symmetric)
        if kind == torch.int8:
            x = inputs.codes(m, k)
            given, rows = _x_scale(inputs, m, k, "one" if option[4] == "one" else "rows")
        else:
            x, given, rows = inputs.randn(m, k, dtype=kind), None, None
        packed, dense = qkernels.pack(weight), weight.dequantize().double()
        _linear(
            inputs,
            lambda **rest: qkernels.int4_linear(x, given, packed, **rest),
            lambda bias: oracle.linear4(x, rows, dense, -(-k // group), bias),
            m,
            n,
            option,
        )

    kinds = (torch.int8, torch.bfloat16, torch.float16, torch.float32)
    combinations = list(itertools.product(kinds, (32, 64, 128, 10**6), (True, False)))
    for number, shape in enumerate(inputs.shapes(LINEAR, TINY_LINEAR)):
        few = combinations[number % 6 :: 6] if shape[0] * shape[1] < 10**6 else combinations[number % 16 :: 16]
        for at, (kind, group, symmetric) in enumerate(few):
            case = (*shape, group, symmetric, kind, OPTIONS[(number + at) % 8])
            yield " ".join(map(str, case)), lambda case=case: check(*case)


def attention(inputs: Inputs) -> Iterator[Case]:
    def check(shape: tuple[int, ...], dtype: torch.dtype, causal: bool, mask_kind: str, leaves: str) -> None:
        batch, queries, keys, heads, d = shape
        if leaves == "packed":  # one projection made q, k and v
            q, k, v = inputs.randn(batch, queries, 3 * heads * d, dtype=dtype).unflatten(-1, (3, heads, d)).unbind(2)
            keys = queries
        else:
            q, k, v = (inputs.randn(batch, length, heads, d, dtype=dtype) for length in (queries, keys, keys))
        mask = None
        if mask_kind == "float":
            mask = inputs.randn(batch, heads, queries, keys)
        elif mask_kind == "bool":
            mask = inputs.rand(queries, keys) > 0.3
        want = oracle.attention(q, k, v, mask, causal, d**-0.5)
        error = 1e-5 + (0.0 if dtype == torch.float32 else oracle.ULP[dtype]) * oracle.attention(
            q, k, v.abs(), mask, causal, d**-0.5
        )
        if leaves in ("float", "packed"):
            out = inputs.poison(*q.shape, dtype=dtype)
            qkernels.attention(q, k, v, mask, causal, out=out)
            away = out.double() - want
            if dtype == torch.float32:
                require((away.abs() <= 1e-5).all(), f"off by {float(away.abs().max()):.2g}")
            else:
                require(away.norm() <= 1e-2 * want.norm() + 1e-6, f"relative L2 {float(away.norm() / want.norm()):.2g}")
            return
        codes = inputs.poison(*q.shape, dtype=torch.int8)
        if leaves == "dynamic":
            scales = inputs.poison(batch, queries)
            qkernels.attention(q, k, v, mask, causal, out_dynamic=True, out=(codes, scales))
            steps, most = want.abs().amax((2, 3)) / 127, error.amax((2, 3))
            require(((scales.double() - steps).abs() <= most / 127).all(), "a scale is off")
            error = (error + 1.5 * most[:, :, None, None]) / steps[:, :, None, None]
            written(codes)
            oracle.near_codes(codes, want / steps[:, :, None, None], error, "codes")
        else:
            step = inputs.rand(heads, d) * 0.02 + 0.001
            qkernels.attention(q, k, v, mask, causal, out_scale=step, out=codes)
            written(codes)
            oracle.near_codes(codes, want / step.double(), error / step.double() + 1e-4, "codes")

    full = [
        (2, 50, 50, 12, 64),
        (2, 77, 77, 8, 64),
        (1, 257, 257, 16, 64),
        (1, 577, 577, 4, 64),
        (3, 1, 17, 2, 8),
        (2, 9, 64, 3, 80),
        (1, 33, 129, 2, 88),
        (1, 2, 3, 1, 1),
    ]
    for number, shape in enumerate(inputs.shapes(full, [(1, 5, 5, 2, 8), (2, 3, 17, 1, 16)])):
        ways = list(itertools.product(FLOATS, ("float", "static", "dynamic", "packed")))
        for dtype, leaves in ways if number < 2 else ways[number % 4 :: 4]:
            yield f"{shape} {dtype} {leaves}", lambda s=shape, d=dtype, o=leaves: check(s, d, False, "", o)
        for mask in ("float", "bool", "causal"):
            case = (shape, torch.bfloat16, mask == "causal", mask, "float")
            yield f"{shape} mask {mask}", lambda case=case: check(*case)
