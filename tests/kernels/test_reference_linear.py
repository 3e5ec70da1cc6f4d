"""The reference of the linear ops against NumPy: the fast backends are compared with float64 in files of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkernels
from qkernels import Int4Weight, Int8Weight
from tests.kernels import oracles
from tests.kernels.oracles import examples, f32, f64, same, seeds


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("QKERNELS_BACKEND", "reference")


def parts(seed, k, n, scale_kind):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (2, 3, k), generator=generator, dtype=torch.int8)
    shape = {"scalar": (), "rows": (2, 3), "groups": (2, 3, -(-k // 128))}[scale_kind]
    x_scale = torch.rand(shape, generator=generator) * 0.01
    weight = torch.randn(n, k, generator=generator)
    return x, x_scale, weight, torch.randn(n, generator=generator), torch.randn(2, 3, n, generator=generator)


def dequantized(x, x_scale):
    s = f64(x_scale)
    if s.ndim == x.dim():
        s = np.repeat(s, 128, axis=-1)[..., : x.shape[-1]]
    elif s.ndim:
        s = s[..., None]
    return f64(x) * s


def four_bits(weight):
    """Values of an Int4Weight from its stored bytes."""
    n, k = weight.shape
    packed = weight.codes.numpy()
    codes = np.empty((n, 2 * packed.shape[1]))
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    scales = np.repeat(f64(weight.scales), weight.group, axis=1)[:, :k]
    zeros = 8 if weight.zeros is None else np.repeat(f64(weight.zeros), weight.group, axis=1)[:, :k]
    return scales * (codes[:, :k] - zeros)


def check(result, linear, activation, residual, bias, size):
    y = oracles.activate(linear, activation)
    y = y if residual is None else y + f64(residual)
    largest = size + np.abs(f64(bias)) + (0 if residual is None else np.abs(f64(residual)))
    assert (np.abs(f64(result) - y) <= 4 * 2.0**-23 * largest + 1e-6).all()


@examples(40)
@given(
    seeds,
    st.sampled_from([1, 7, 128, 130, 300]),
    st.sampled_from([1, 5, 128, 200]),
    st.sampled_from(["scalar", "rows", "groups"]),
    st.sampled_from([None, "gelu", "quick_gelu", "gelu_tanh"]),
    st.booleans(),
    st.booleans(),
)
def test_float_results(seed, k, n, scale_kind, activation, packed, with_residual):
    x, x_scale, w, bias, residual = parts(seed, k, n, scale_kind)
    residual = residual if with_residual else None
    weight = Int8Weight.quantize(w)
    weight = weight.pack("vnni64") if packed else weight
    y = qkernels.int8_linear(x, x_scale, weight, bias, activation, residual)
    w64 = f64(weight.canonical().codes) * f64(weight.scales)[:, None]
    linear = dequantized(x, x_scale) @ w64.T
    check(y, linear + f64(bias), activation, residual, bias, np.abs(linear))

    weight = Int4Weight.quantize(w, group=32, symmetric=bool(seed % 2))
    w64 = four_bits(weight)
    weight = weight.pack("nibble64") if packed else weight
    linear = dequantized(x, x_scale) @ w64.T
    y = qkernels.int4_linear(x, x_scale, weight, bias, activation, residual)
    check(y, linear + f64(bias), activation, residual, bias, np.abs(linear))
    floats = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(seed))
    linear = f64(floats) @ w64.T
    y = qkernels.int4_linear(floats, None, weight, bias, activation, residual)
    check(y, linear + f64(bias), activation, residual, bias, np.abs(linear))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_dtypes_are_rounded_once(dtype):
    x, x_scale, w, bias, residual = parts(0, 64, 16, "rows")
    weight = Int8Weight.quantize(w)
    y = qkernels.int8_linear(x, x_scale, weight, bias, None, residual.to(dtype), out_dtype=dtype)
    full = qkernels.int8_linear(x, x_scale, weight, bias, None, residual.to(dtype))
    assert y.dtype == dtype and torch.equal(y, full.to(dtype))


@examples(30)
@given(seeds, st.sampled_from([5, 128, 200, 300]), st.sampled_from(["one", "channels", "zero point", "groups"]))
def test_int8_results(seed, n, kind):
    x, x_scale, w, bias, _ = parts(seed, 64, n, "rows")
    weight = Int8Weight.quantize(w)
    y = f64(qkernels.int8_linear(x, x_scale, weight, bias, "gelu"))
    if kind == "groups":
        out = torch.full((2, 3, n), 9, dtype=torch.int8), torch.full((2, 3, -(-n // 128)), -1.0)
        assert qkernels.int8_linear(x, x_scale, weight, bias, "gelu", out_group=128, out=out) is out
        for g in range(out[1].shape[-1]):
            codes, scales = oracles.quantize_rows(y[..., 128 * g : 128 * g + 128])
            assert same(out[0][..., 128 * g : 128 * g + 128], codes) and same(out[1][..., g], scales)
        return
    scale = torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.001
    scale = scale if kind == "channels" else scale[0]
    zero = 11 if kind == "zero point" else None
    codes = qkernels.int8_linear(x, x_scale, weight, bias, "gelu", out_scale=scale, out_zero_point=zero)
    assert same(codes, np.clip(np.rint(f32(y * f32(1 / f64(scale)))) + (zero or 0), -127, 127))


def test_faults_become_code_0_or_a_nan_scale():
    x, x_scale, w, bias, _ = parts(0, 64, 200, "rows")
    x_scale[0, 1] = float("nan")
    weight = Int8Weight.quantize(w)
    y = qkernels.int8_linear(x, x_scale, weight, bias)
    assert y[0, 1].isnan().all() and y[0, 0].isfinite().all() and y[1].isfinite().all()
    codes = qkernels.int8_linear(x, x_scale, weight, bias, out_scale=0.01)
    assert codes[0, 1].abs().sum() == 0 and codes[0, 0].abs().sum() > 0
    codes, scales = qkernels.int8_linear(x, x_scale, weight, bias, out_group=128)
    assert codes[0, 1].abs().sum() == 0 and scales[0, 1].isnan().all() and scales[1].isfinite().all()


def test_largest_accumulator_is_exact():
    x = torch.full((1, 65536), 127, dtype=torch.int8)
    weight = Int8Weight(torch.full((2, 65536), 127, dtype=torch.int8), torch.ones(2), (2, 65536))
    assert (qkernels.int8_linear(x, 1.0, weight) == float(np.float32(127 * 127 * 65536))).all()
