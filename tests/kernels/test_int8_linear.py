"""int8_linear on every CPU tier: exact sums, the epilogue within its bounds, every size, corners, no stray writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qkernels
from qkernels import Int8Weight
from tests.kernels.fresh_memory import guarded
from tests.kernels.linear_cases import (
    Exact,
    check_codes,
    check_float,
    check_groups,
    finish,
)
from tests.kernels.tiers import TIERS, force


def codes(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def unit_weight(w: torch.Tensor) -> Int8Weight:
    return Int8Weight(w, torch.ones(w.shape[0]), (w.shape[0], w.shape[1]))


def exact_sums(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Sums in int64."""
    return x.long() @ w.long().t()


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
def test_sums_are_exact_for_every_size_from_1_to_129(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, tier)
    generator = torch.Generator().manual_seed(0)
    one = torch.ones(())
    for size in range(1, 130):
        other = [1, 2, 3, 5, 6, 7, 63, 64, 65, 128, 129]
        a, b = other[size % 11], other[(size * 7 + 3) % 11]
        for m, n, k in ((size, a, b), (a, size, b), (a, b, size)):
            x, w = codes(generator, m, k), codes(generator, n, k)
            y = qkernels.int8_linear(x, one, unit_weight(w).pack("vnni64"))
            assert torch.equal(y.long(), exact_sums(x, w)), (m, n, k)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("rows, k", [(7, 4095), (25, 4100), (25, 8200), (7, 65536)])
def test_deep_sums_and_saturation(tier: str, rows: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest magnitudes everywhere, in all sign patterns, up to the deepest K: nothing saturates or wraps.

    For 25 rows, avx2 copies the panels first.
    """
    force(monkeypatch, tier)
    x = torch.full((rows, k), 127, dtype=torch.int8)
    x[1] = -127
    x[2, ::2] = -127
    x[3, 1::2] = -127
    x[4, k // 2 :] = -127
    x[5] = -128
    w = torch.full((66, k), 127, dtype=torch.int8)
    w[1] = -127
    w[2, ::2] = -127
    w[3, k // 3 :] = -127
    y = qkernels.int8_linear(x, torch.ones(()), unit_weight(w).pack("vnni64"))
    assert torch.equal(y, exact_sums(x, w).float())


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=60)
@given(data=st.data())
def test_epilogue_within_the_contract(tier: str, data: st.DataObject, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, tier)
    m, n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 270)), data.draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    activation = data.draw(st.sampled_from([None, "gelu", "quick_gelu", "gelu_tanh"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scale_kind = data.draw(st.sampled_from(["scalar", "row", "group"]))
    output = data.draw(st.sampled_from(["float", "static", "static per column", "groups"]))
    x = codes(generator, m, k)
    w = Int8Weight(codes(generator, n, k), torch.rand(n, generator=generator) * 0.002 + 1e-4, (n, k))
    groups = -(-k // 128)
    shape = {"scalar": (), "row": (m,), "group": (m, groups)}[scale_kind]
    x_scale = torch.rand(shape, generator=generator) * 0.05 + 1e-3
    bias = torch.randn(n, generator=generator).to(dtype) if data.draw(st.booleans()) else None
    residual = torch.randn(m, n, generator=generator).to(dtype) if data.draw(st.booleans()) else None

    if scale_kind == "group":
        spread = x_scale.double().repeat_interleave(128, dim=1)[:, :k]
        linear = (x.double() * spread) @ w.codes.double().t() * w.scales.double()
        terms = [
            (x[:, 128 * g : 128 * g + 128].double() @ w.codes[:, 128 * g : 128 * g + 128].double().t()).abs()
            * x_scale[:, g : g + 1].double()
            for g in range(groups)
        ]
        size, ulps = sum(terms) * w.scales.double(), groups + 2
    else:
        scales = (x_scale.reshape(-1, 1) * w.scales).double()
        linear = exact_sums(x, w.codes).double() * scales
        size, ulps = linear.abs(), 2
    if bias is not None:
        linear = linear + bias.double()
        size = size + bias.double().abs() if scale_kind == "group" else torch.maximum(size, bias.double().abs())
    exact: Exact = finish(linear, size, ulps, activation, residual)

    kwargs: dict = {"bias": bias, "activation": activation, "residual": residual}
    packed = w.pack("vnni64")
    if output == "groups":
        result, result_scales = qkernels.int8_linear(x, x_scale, packed, out_group=128, **kwargs)
        check_groups(result, result_scales, exact)
    elif output == "float":
        out = guarded((m, n), dtype)
        qkernels.int8_linear(x, x_scale, packed, out_dtype=dtype, out=out, **kwargs)
        check_float(out, exact)
    else:
        out_scale = torch.rand(n if "column" in output else (), generator=generator) * 0.05 + 0.01
        out = guarded((m, n), torch.int8)
        zero = data.draw(st.sampled_from([None, -3, 100]))
        qkernels.int8_linear(x, x_scale, packed, out_scale=out_scale, out_zero_point=zero, out=out, **kwargs)
        check_codes(out, exact, out_scale, float(zero or 0))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_tanh"])
def test_activation_over_its_range(tier: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 1 makes every float: 127 codes times many scales, both signs, dense where the function bends."""
    force(monkeypatch, tier)
    x = torch.arange(-127, 128, dtype=torch.int8)[:, None]
    scales = torch.cat([torch.linspace(1e-4, 0.06, 400), torch.logspace(-6, 3, 60)])
    weight = Int8Weight(torch.ones(len(scales), 1, dtype=torch.int8), scales, (len(scales), 1))
    y = qkernels.int8_linear(x, torch.ones(()), weight.pack("vnni64"), activation=activation)
    linear = x.double() * scales.double()
    check_float(y, finish(linear, linear.abs(), 2, activation, None))
    assert (y[127] == 0).all()
    far = linear < -30
    assert (y[far].abs() < 1e-6).all()


@pytest.mark.parametrize("tier", TIERS)
def test_non_finite_values(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN scale makes its row NaN and no other; int8 output writes 0 there, and groups carry it in their scale."""
    force(monkeypatch, tier)
    generator = torch.Generator().manual_seed(0)
    x, weight = codes(generator, 9, 33), unit_weight(codes(generator, 200, 33)).pack("vnni64")
    scale = torch.ones(9)
    scale[4] = float("nan")
    rest = [0, 1, 2, 3, 5, 6, 7, 8]
    for activation in (None, "gelu", "quick_gelu", "gelu_tanh"):
        y = qkernels.int8_linear(x, scale, weight, activation=activation)
        assert torch.isnan(y[4]).all() and torch.isfinite(y[rest]).all()
    bias = torch.zeros(200)
    bias[7] = float("inf")
    out = qkernels.int8_linear(x, scale, weight, bias, out_scale=torch.tensor(100.0), out_zero_point=5)
    assert (out[4] == 0).all() and (out[:, 7] == 0).all() and (out[rest] != 0).any()
    grouped, group_scales = qkernels.int8_linear(x, scale, weight, bias, out_group=128)
    assert torch.isnan(group_scales[:, 0]).all() and (grouped[:, :128] == 0).all()
    assert torch.isnan(group_scales[4]).all() and torch.isfinite(group_scales[rest, 1]).all()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_round_half_to_even(tier: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole sums, many of them between two numbers of the type, and a NaN whose bits would overflow in rounding."""
    force(monkeypatch, tier)
    generator = torch.Generator().manual_seed(0)
    x, w = codes(generator, 13, 33), codes(generator, 70, 33) // 18
    residual = torch.zeros(13, 70)
    residual[3, 5] = residual[7, 69] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y = qkernels.int8_linear(x, torch.ones(()), unit_weight(w).pack("vnni64"), residual=residual, out_dtype=dtype)
    expected = (exact_sums(x, w) + residual).to(dtype)
    assert torch.equal(y.isnan(), residual.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("tier", TIERS)
def test_leading_dimensions_zero_rows_and_threads(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, tier)
    generator = torch.Generator().manual_seed(0)
    weight = Int8Weight.quantize(torch.randn(150, 70, generator=generator)).pack("vnni64")
    x = codes(generator, 5, 43, 70)
    scale = torch.rand(5, 43, generator=generator)
    whole = qkernels.int8_linear(x, scale, weight)
    assert whole.shape == (5, 43, 150)
    assert torch.equal(whole.view(215, 150), qkernels.int8_linear(x.view(215, 70), scale.view(215), weight))
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(qkernels.int8_linear(strided, scale, weight), whole)
    assert qkernels.int8_linear(x[:0], scale[:0], weight).shape == (0, 43, 150)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(qkernels.int8_linear(x, scale, weight), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tier", TIERS)
def test_more_rows_than_one_copy_holds(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 8 MB the activations are copied in several chunks."""
    force(monkeypatch, tier)
    generator = torch.Generator().manual_seed(0)
    x, w = codes(generator, 2100, 4200), codes(generator, 3, 4200)
    y = qkernels.int8_linear(x, torch.ones(()), unit_weight(w).pack("vnni64"))
    assert torch.equal(y, (x.double() @ w.double().t()).float())
