"""int4_linear on every CPU tier: W4A8 and W4A16, all groups, symmetric and float zeros, every size, no stray writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qkernels
from qkernels import Int4Weight
from tests.kernels.fresh_memory import guarded
from tests.kernels.linear_cases import (
    Exact,
    check_codes,
    check_float,
    check_groups,
    finish,
)
from tests.kernels.tiers import TIERS, force


def group_terms(x: torch.Tensor, weight: Int4Weight) -> tuple[torch.Tensor, int]:
    """Sum over groups of |scale * (code - 8) . x| + |scale * (zero - 8) * sum(x)|, and the number of groups."""
    n, k = weight.shape
    code = weight.unpacked_codes().double() - 8
    total = torch.zeros(x.shape[0], n, dtype=torch.float64)
    count = -(-k // weight.group)
    for g in range(count):
        part = slice(g * weight.group, min((g + 1) * weight.group, k))
        scale = weight.scales[:, g].double()
        total += (x[:, part].double() @ code[:, part].t() * scale).abs()
        if weight.zeros is not None:
            total += (x[:, part].double().sum(1, keepdim=True) * (weight.zeros[:, g].double() - 8) * scale).abs()
    return total, count


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
def test_sums_are_exact_for_every_size_from_1_to_129(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of one and whole zeros: small integers, exact in float32."""
    force(monkeypatch, tier)
    generator = torch.Generator().manual_seed(0)
    for size in range(1, 130):
        other = [1, 2, 3, 5, 6, 7, 63, 64, 65, 128, 129]
        a, b = other[size % 11], other[(size * 7 + 3) % 11]
        for m, n, k in ((size, a, b), (a, size, b), (a, b, size)):
            group = (32, 64, 128, k)[size % 4]
            group = min(group, k)
            groups = -(-k // group)
            w = torch.randint(-8, 8, (n, k), generator=generator).float()
            zeros = None if size % 2 else torch.full((n, groups), 8.0)
            weight = Int4Weight.quantize(w, group, scales=torch.ones(n, groups), zeros=zeros)
            x = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
            want = x.long() @ w.long().t()
            packed = weight.pack("nibble64")
            assert torch.equal(qkernels.int4_linear(x, torch.ones(()), packed).long(), want), (m, n, k, group)
            assert torch.equal(qkernels.int4_linear(x.float(), None, packed).long(), want), (m, n, k, group)


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=60)
@given(data=st.data())
def test_w4a8_within_the_contract(tier: str, data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, tier)
    m, n, k = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 200)), data.draw(st.integers(1, 400))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    group = data.draw(st.sampled_from([32, 64, 128, k]))
    kind = data.draw(st.sampled_from(["symmetric", "negative scales", "whole zeros", "fractional zeros"]))
    w = torch.randn(n, k, generator=generator)
    weight = Int4Weight.quantize(w, group, symmetric=kind != "whole zeros")
    if kind == "negative scales":
        signs = torch.randn(weight.scales.shape, generator=generator).sign()
        weight = Int4Weight.quantize(w, group, scales=weight.scales * signs)
    if kind == "fractional zeros":
        zeros = torch.rand(weight.scales.shape, generator=generator) * 15
        weight = Int4Weight.quantize(w, group, scales=weight.scales, zeros=zeros)
    x = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    scale_kind = data.draw(st.sampled_from(["scalar", "row", "group"]))
    x_groups = -(-k // 128)
    shape = {"scalar": (), "row": (m,), "group": (m, x_groups)}[scale_kind]
    x_scale = torch.rand(shape, generator=generator) * 0.05 + 1e-3
    bias = torch.randn(n, generator=generator) if data.draw(st.booleans()) else None
    residual = torch.randn(m, n, generator=generator) if data.draw(st.booleans()) else None
    activation = data.draw(st.sampled_from([None, "gelu", "quick_gelu", "gelu_tanh"]))
    output = data.draw(st.sampled_from(["float", "static", "groups"]))

    spread = (
        x_scale
        if scale_kind == "scalar"
        else x_scale.reshape(m, -1).repeat_interleave(128 if scale_kind == "group" else k, 1)
    )
    real = x.double() * (spread if scale_kind == "scalar" else spread[:, :k]).double()
    linear = real @ weight.dequantize().double().t()
    size, count = group_terms(real, weight)
    if scale_kind == "group":  # partial sums of a weight's group are terms of their own
        count = max(count, x_groups)
        size = sum(
            group_terms(torch.where((torch.arange(k) // 128 == g)[None], real, 0.0), weight)[0] for g in range(x_groups)
        )
    if bias is not None:
        linear, size = linear + bias.double(), size + bias.double().abs()
    if residual is not None:
        size = size + residual.double().abs()
    exact: Exact = finish(linear, size, count + 2, activation, residual)

    packed = weight.pack("nibble64")
    kwargs: dict = {"bias": bias, "activation": activation, "residual": residual}
    if output == "groups":
        check_groups(*qkernels.int4_linear(x, x_scale, packed, out_group=128, **kwargs), exact)
    elif output == "static":
        out_scale = torch.tensor(0.05)
        check_codes(qkernels.int4_linear(x, x_scale, packed, out_scale=out_scale, **kwargs), exact, out_scale)
    else:
        out = guarded((m, n), torch.float32)
        qkernels.int4_linear(x, x_scale, packed, out=out, **kwargs)
        check_float(out, exact)


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=40)
@given(data=st.data())
def test_w4a16_within_the_contract(tier: str, data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, tier)
    m, n, k = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 200)), data.draw(st.integers(1, 600))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    w, group = torch.randn(n, k, generator=generator), data.draw(st.sampled_from([32, 64, 128, k]))
    weight = Int4Weight.quantize(w, group, symmetric=data.draw(st.booleans()))
    if data.draw(st.booleans()):
        weight = Int4Weight.quantize(w, group, scales=-weight.scales, zeros=weight.zeros)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = torch.randn(m, k, generator=generator).to(dtype)
    linear = x.double() @ weight.dequantize().double().t()
    size = x.double().abs() @ weight.dequantize().double().abs().t()
    y = qkernels.int4_linear(x, None, weight.pack("nibble64"))
    # Computed in float32 from the first product on, so that 16-bit inputs meet the bound of float32 ones.
    assert ((y.double() - linear).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("tier", TIERS)
def test_extremes_deep_products_and_faults(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, tier)
    k = 65536
    weight = Int4Weight.quantize(torch.full((2, k), -8.0), k, scales=torch.ones(2, 1)).pack("nibble64")
    x = torch.full((3, k), 127, dtype=torch.int8)
    x[1] = -128
    x[2, ::2] = -127
    want = (x.long().sum(1, keepdim=True) * -8).repeat(1, 2)
    assert torch.equal(qkernels.int4_linear(x, torch.ones(()), weight), want.float())
    small = Int4Weight.quantize(torch.randn(70, 100)).pack("nibble64")
    scale = torch.tensor([1.0, float("nan")])
    y = qkernels.int4_linear(torch.ones(2, 100, dtype=torch.int8), scale, small)
    assert torch.isfinite(y[0]).all() and torch.isnan(y[1]).all()
    bad = torch.ones(2, 100)
    bad[1, 99] = float("nan")
    y = qkernels.int4_linear(bad, None, small)
    assert torch.isfinite(y[0]).all() and torch.isnan(y[1]).all()


@pytest.mark.parametrize("tier", TIERS)
def test_threads_and_leading_dimensions(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, tier)
    generator = torch.Generator().manual_seed(0)
    weight = Int4Weight.quantize(torch.randn(300, 200, generator=generator), 64, symmetric=False).pack("nibble64")
    x = torch.randint(-127, 128, (3, 101, 200), generator=generator, dtype=torch.int8)
    scale = torch.rand(3, 101, generator=generator)
    floats = torch.randn(3, 101, 200, generator=generator)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        codes, real = qkernels.int4_linear(x, scale, weight), qkernels.int4_linear(floats, None, weight)
        assert codes.shape == (3, 101, 300)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(qkernels.int4_linear(x, scale, weight), codes)
            assert torch.equal(qkernels.int4_linear(floats, None, weight), real)
    finally:
        torch.set_num_threads(before)
    assert qkernels.int4_linear(x[:0], scale[:0], weight).shape == (0, 101, 300)
