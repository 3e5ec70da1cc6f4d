"""int4_linear of csrc/cuda, emulated, against the reference: exact sums at every size, and the contract's bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qkernels import Int4Weight, cuda
from qkernels.contract import Epilogue
from tests.kernels.fresh_memory import guarded
from tests.kernels.linear_cases import check_codes, check_float, check_groups, finish
from tests.kernels.test_int4_linear import group_terms

# m around a block's 16 and 64 tokens, n around its 128 channels, k around its steps of 128.
SIZES = [
    (1, 1, 1),
    (3, 15, 31),
    (8, 128, 128),
    (15, 17, 129),
    (16, 127, 136),
    (17, 129, 255),
    (33, 40, 127),
    (63, 16, 256),
    (64, 128, 384),
    (65, 131, 152),
]

EPILOGUES = [(None, "float"), ("gelu", "static"), ("quick_gelu", "groups"), ("gelu_tanh", "float")]


def weight_of(n: int, k: int, group: int, zeros: str, seed: int) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    weight = Int4Weight.quantize(w, group, symmetric=zeros != "whole")
    if zeros == "none":  # rows of a turned grid among them
        weight = Int4Weight.quantize(w, group, scales=weight.scales * (1 - 2 * (torch.arange(n) % 2))[:, None])
    if zeros == "fractional":
        offsets = torch.rand(weight.scales.shape, generator=generator) * 15
        weight = Int4Weight.quantize(w, group, scales=weight.scales, zeros=offsets)
    return weight


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_sums_of_whole_numbers_are_exact(emulated: Any, group: int | None, dtype: torch.dtype) -> None:
    """Scales of one, whole zeros: every sum is a whole number below 2^24. Each code has its own place in x."""
    generator = torch.Generator().manual_seed(0)
    for m, n, k in SIZES:
        for zeros in (None, 3.0):
            w = torch.randint(0, 16, (n, k), generator=generator).float() - (8 if zeros is None else zeros)
            part = k if group is None else min(group, k)
            ones = torch.ones(n, -(-k // part))
            weight = Int4Weight.quantize(w, part, scales=ones, zeros=None if zeros is None else ones * zeros)
            x = torch.randint(-127, 128, (m, k), generator=generator).to(dtype)
            out = guarded((m, n), torch.float32)
            scale = torch.ones(()) if dtype == torch.int8 else None
            assert emulated.int4_linear(x, scale, weight.pack("halves128"), out=out) is out
            assert torch.equal(out.long(), x.long() @ w.long().t()), (m, n, k, zeros)


@pytest.mark.parametrize("scale_kind", ["scalar", "row", "group"])
@pytest.mark.parametrize("zeros", ["none", "whole", "fractional"])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_w4a8_within_the_contract(emulated: Any, group: int | None, zeros: str, scale_kind: str) -> None:
    # Each of the cases meets two of the epilogues.
    first = (group or 0) // 32 + len(zeros) + len(scale_kind)
    for seed, (m, n, k) in enumerate(((5, 130, 300), (20, 48, 640)), first):
        activation, output = EPILOGUES[seed % 4]
        generator = torch.Generator().manual_seed(seed)
        weight = weight_of(n, k, k if group is None else group, zeros, seed)
        x = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
        x_groups = -(-k // 128)
        shape = {"scalar": (), "row": (m,), "group": (m, x_groups)}[scale_kind]
        x_scale = torch.rand(shape, generator=generator) * 0.05 + 1e-3
        bias = torch.randn(n, generator=generator) if seed % 3 else None
        residual = torch.randn(m, n, generator=generator) if seed % 2 else None

        spread = x_scale.reshape(-1, 1)
        if scale_kind == "group":
            spread = x_scale.repeat_interleave(128, 1)[:, :k]
        real = x.double() * spread.double()
        linear = real @ weight.dequantize().double().t()
        size, count = group_terms(real, weight)
        if scale_kind == "group":  # partial sums of a weight's group are terms of their own
            count = max(count, x_groups)
            masks = [(torch.arange(k) // 128 == g)[None] for g in range(x_groups)]
            size = sum(group_terms(torch.where(mask, real, 0.0), weight)[0] for mask in masks)
        if bias is not None:
            linear, size = linear + bias.double(), size + bias.double().abs()
        if residual is not None:
            size = size + residual.double().abs()
        exact = finish(linear, size, count + 2, activation, residual)
        arguments: dict = {"bias": bias, "activation": activation, "residual": residual}
        packed = weight.pack("halves128")
        if output == "groups":
            check_groups(*emulated.int4_linear(x, x_scale, packed, Epilogue(out_group=128, **arguments)), exact)
        elif output == "static":
            out_scale = torch.rand(n, generator=generator) * 0.05 + 0.02 if seed % 4 == 1 else torch.tensor(0.05)
            zero = torch.tensor(4.0)
            end = Epilogue(out_scale=out_scale, out_zero_point=zero, **arguments)
            got = emulated.int4_linear(x, x_scale, packed, end)
            check_codes(got, exact, out_scale, 4.0)
        else:
            out = guarded((m, n), torch.float32)
            emulated.int4_linear(x, x_scale, packed, Epilogue(**arguments), out=out)
            check_float(out, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zeros", ["none", "fractional"])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_w4a16_sums_in_float32(emulated: Any, group: int | None, zeros: str, dtype: torch.dtype) -> None:
    for m, n, k in ((1, 200, 520), (16, 33, 1100), (40, 70, 259)):
        generator = torch.Generator().manual_seed(m)
        weight = weight_of(n, k, k if group is None else group, zeros, m)
        x = torch.randn(m, k, generator=generator).to(dtype)
        y = emulated.int4_linear(x, None, weight.pack("halves128"))
        linear = x.double() @ weight.dequantize().double().t()
        size, _ = group_terms(x, weight)
        size = size + x.double().abs() @ weight.dequantize().double().abs().t()
        # Dequantized codes and products are exact: what is left is the order of at most 1100 float32 sums.
        assert ((y.double() - linear).abs() <= 1e-5 * size).all()
        for out_dtype in (torch.bfloat16, torch.float16):
            residual = torch.randn(m, n, generator=generator).to(out_dtype)
            end = Epilogue(residual=residual, out_dtype=out_dtype)
            got = emulated.int4_linear(x, None, weight.pack("halves128"), end)
            exact = finish(linear, size, 90, None, residual)  # 1e-5 of size, in ulps
            check_float(got, exact)


def test_splits_of_k_add_up_in_their_order(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However K is cut, the result is the same but for the rounding of its float32 sums; integer sums are the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (70, 1000), generator=generator, dtype=torch.int8)
    plans = [(16, 5, 1), (16, 5, 3), (64, 2, 8), (64, 2, 2)]
    for group, dtype in ((1000, torch.int8), (64, torch.int8), (128, torch.bfloat16)):
        weight = weight_of(40, 1000, group, "none", 1).pack("halves128")
        found = []
        for plan in plans:
            monkeypatch.setattr(cuda, "_int4_plan", lambda *_, plan=plan: plan)
            found.append(emulated.int4_linear(x.to(dtype), torch.tensor(0.01) if dtype == torch.int8 else None, weight))
        for other in found[1:]:
            if group == 1000:
                assert torch.equal(other, found[0])
            torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-3)


def test_plans_fill_a_gpu_and_depend_on_the_shape_alone() -> None:
    assert cuda._int4_plan(1, 4096, 4096, True) == (16, 32, 8)
    assert cuda._int4_plan(16, 16384, 8192, True) == (16, 128, 2)
    assert cuda._int4_plan(16, 1024, 100, True) == (16, 8, 1)
    assert cuda._int4_plan(16448, 4096, 1024, True) == (64, 257 * 32, 1)
    assert cuda._int4_plan(4, 64, 4096, False) == (16, 1, 1)


def test_faults_and_extremes(emulated: Any) -> None:
    k = 2048
    weight = Int4Weight.quantize(torch.full((2, k), -8.0), k, scales=torch.ones(2, 1)).pack("halves128")
    x = torch.full((3, k), 127, dtype=torch.int8)
    x[1] = -128
    x[2, ::2] = -127
    want = (x.long().sum(1, keepdim=True) * -8).repeat(1, 2)
    assert torch.equal(emulated.int4_linear(x, torch.ones(()), weight), want.float())
    # A faulty row comes out NaN, as codes 0 with a NaN scale, and leaves its neighbours alone.
    scale = torch.tensor([0.1, math.nan, 0.2])
    y = emulated.int4_linear(x, scale, weight)
    assert y[1].isnan().all() and torch.isfinite(y[[0, 2]]).all()
    codes, scales = emulated.int4_linear(x, scale, weight, Epilogue(out_group=128))
    assert scales.isnan().flatten().tolist() == [False, True, False] and (codes[1] == 0).all()
    assert (emulated.int4_linear(x, scale, weight, Epilogue(out_scale=torch.tensor(1.0)))[1] == 0).all()
    small = weight_of(70, 100, 32, "whole", 0).pack("halves128")
    assert emulated.int4_linear(torch.empty(0, 100, dtype=torch.bfloat16), None, small).shape == (0, 70)
    x16 = torch.randn(2, 3, 201, generator=torch.Generator().manual_seed(3)).half()[..., 1:101]  # strided, off 16 bytes
    dense = emulated.int4_linear(x16.contiguous(), None, small)
    assert torch.equal(emulated.int4_linear(x16, None, small), dense) and dense.shape == (2, 3, 70)


def test_what_the_backend_leaves_to_others() -> None:
    weight = weight_of(8, 32, 32, "none", 0)
    limits = cuda._limits["int4_linear"]
    assert "halves128" in limits(torch.ones(1, 32).half(), None, weight)
    assert "float32" in limits(torch.ones(1, 32), None, weight.pack("halves128"))
    assert limits(torch.ones(1, 32).half(), None, weight.pack("halves128")) is None
