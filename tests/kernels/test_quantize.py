"""quantize_per_token, layer_norm_quantize, channel_absmax and smooth_scale against NumPy, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkernels
from tests.kernels import oracles
from tests.kernels.fresh_memory import guarded, guarded_codes
from tests.kernels.oracles import FLOATS, dtypes, examples, f32, f64, same, seeds

widths = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 255, 768, 1000]))
leads = st.sampled_from([(), (1,), (3,), (2, 5), (4, 1, 2), (0,), (2, 0)])


def sample(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values at a scale of their own a row, some rows special."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn((*shape[:-1], 1), generator=generator))
    rows = x.view(-1, shape[-1])
    specials = [None, None, 0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-38, 2.0**-101, 3e38]
    for row in rows:
        special = specials[int(torch.randint(len(specials), (), generator=generator))]
        if special is not None:
            at = int(torch.randint(shape[-1], (), generator=generator))
            row.copy_(row * 0 if abs(special) < 1 else row)
            row[at] = special
    return x.to(dtype)


@examples(60)
@given(
    seeds,
    leads,
    widths,
    dtypes,
    st.booleans(),
    st.sampled_from([None, 0.013, 1.0, 7e-39, 1e30]),
    st.sampled_from([None, -3, 127]),
)
def test_quantize_per_token_is_bit_exact(backend, seed, lead, k, dtype, smoothed, scale, zero_point):
    x = sample(seed, *lead, k, dtype=dtype)
    smooth = torch.rand(k, generator=torch.Generator().manual_seed(seed)) + 0.5 if smoothed else None
    zero_point = None if scale is None else zero_point
    out = guarded_codes(*lead, k)
    codes, scales = qkernels.quantize_per_token(x, smooth, scale, zero_point, out=out)
    assert codes is out[0] and scales is out[1]
    y = f32(f64(x) * (1.0 if smooth is None else f64(smooth)))
    expected = oracles.quantize_rows(y, scale, zero_point or 0)
    assert same(codes, expected[0]) and same(scales, expected[1])


def test_rounding_is_half_to_even(backend):
    halves = torch.arange(-126.5, 127.0)
    x = torch.cat([halves, torch.tensor([127.0])])
    even = torch.tensor(np.rint(halves.numpy()), dtype=torch.int8)
    codes, scale = qkernels.quantize_per_token(x)  # absmax 127: the scale is 1
    assert scale == 1 and torch.equal(codes[:-1], even)
    codes, _ = qkernels.quantize_per_token(x / 4, scale=0.25)
    assert torch.equal(codes[:-1], even)
    # The zero point is added after the rounding: ties stay where they were.
    codes, _ = qkernels.quantize_per_token(halves, scale=1.0, zero_point=1)
    assert torch.equal(codes, (even.int() + 1).clamp(-127, 127).to(torch.int8))


def test_saturation(backend):
    x = torch.tensor([[1e30, -1e30, 127.4, -127.6, 3.4e38, -3.4e38, 0.0, 5.0]] * 3)
    codes, scales = qkernels.quantize_per_token(x, scale=torch.tensor(1.0))
    assert codes[0].tolist() == [127, -127, 127, -127, 127, -127, 0, 5] and scales.tolist() == [1.0] * 3
    codes, _ = qkernels.quantize_per_token(x, scale=1e-30, zero_point=-100)
    assert codes[0].tolist() == [127, -127, 127, -127, 127, -127, -100, 127]
    codes, scale = qkernels.quantize_per_token(torch.tensor([3.4028235e38, -3.4028235e38, 1.7e38]))
    assert codes.tolist() == [127, -127, 63] and scale == np.float32(3.4028235e38) / np.float32(127)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-45])
def test_a_bad_static_scale_makes_rows_nan(backend, scale):
    codes, scales = qkernels.quantize_per_token(torch.ones(2, 5), scale=torch.tensor(scale))
    assert codes.abs().sum() == 0 and scales.isnan().all()


def test_overflow_by_smooth_is_a_fault(backend):
    codes, scales = qkernels.quantize_per_token(torch.full((2, 3), 1e30), smooth=torch.tensor([1.0, 1e30, 1.0]))
    assert codes.abs().sum() == 0 and scales.isnan().all()


@examples(20)
@given(seeds, st.sampled_from(["transposed", "sliced", "stepped", "expanded"]))
def test_strided_input(backend, seed, kind):
    x = torch.randn(12, 40, generator=torch.Generator().manual_seed(seed))
    view = {"transposed": x.t(), "sliced": x[:, 3:30], "stepped": x[::2, ::3], "expanded": x[:, :1].expand(12, 20)}[
        kind
    ]
    codes, scales = qkernels.quantize_per_token(view)
    expected = oracles.quantize_rows(f64(view))
    assert same(codes, expected[0]) and same(scales, expected[1])


@examples(60)
@given(
    seeds,
    st.sampled_from([(1, 1, 8, 8), (2, 3, 12, 20), (3, 2, 9, 35), (1, 3, 37, 66), (0, 3, 8, 40)]),
    st.sampled_from([1, 4, (2, 7), (8, 3), (8, 8), (5, 1)]),
    dtypes,
    st.booleans(),
    st.sampled_from([(None, None), (0.013, None), (0.5, -3)]),
    st.sampled_from(["dense", "channels last", "cropped", "expanded"]),
)
def test_quantize_patches_is_bit_exact(backend, seed, shape, patch, dtype, smoothed, rule, layout):
    x = sample(seed, *shape, dtype=dtype)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "cropped":
        x = sample(seed, shape[0], shape[1] + 1, shape[2] + 3, shape[3] + 5, dtype=dtype)[:, 1:, 2:-1, 1:-4]
    elif layout == "expanded":
        x = x[:, :1].expand(shape)
    size = (patch, patch) if isinstance(patch, int) else patch
    k = shape[1] * size[0] * size[1]
    smooth = torch.rand(k, generator=torch.Generator().manual_seed(seed)) + 0.5 if smoothed else None
    count = shape[2] // size[0] * (shape[3] // size[1])
    out = guarded_codes(shape[0], count, k)
    codes, scales = qkernels.quantize_patches(x, patch, smooth, *rule, out=out)
    assert codes is out[0] and scales is out[1]
    rows = x[:, :, : shape[2] // size[0] * size[0]].unfold(2, size[0], size[0]).unfold(3, size[1], size[1])
    rows = rows.permute(0, 2, 3, 1, 4, 5).reshape(shape[0], count, k)
    y = f32(f64(rows) * (1.0 if smooth is None else f64(smooth)))
    expected = oracles.quantize_rows(y, rule[0], rule[1] or 0)
    assert same(codes, expected[0]) and same(scales, expected[1])


def check_layer_norm(x, weight, bias, smooth, scale, zero_point, result, eps=1e-5):
    """Scales within 1e-5; codes by the rule, one step off only within 1e-5 of a tie, relative to the terms of the
    value."""
    codes, scales = result
    x64 = f64(x)
    y = oracles.layer_norm(x64, None if weight is None else f64(weight), None if bias is None else f64(bias), eps)
    terms = np.abs(y) + (0 if bias is None else 2 * np.abs(f64(bias)))
    if smooth is not None:
        y, terms = y * f64(smooth), terms * f64(smooth)
    bad = ~np.isfinite(x64).all(-1)
    assert np.array_equal(np.isnan(f64(scales)), bad) and not codes.numpy()[bad].any()
    y, terms, codes, scales = y[~bad], terms[~bad], codes[torch.from_numpy(~bad)], f64(scales)[~bad]
    if scale is None:
        largest = np.abs(y).max(-1, initial=0)
        steps = np.where(largest < 2.0**-100, 1.0, largest / 127)
        assert np.allclose(scales, steps, rtol=1e-5, atol=0)
    else:
        steps = np.full(y.shape[:-1], f32(scale))
        assert np.array_equal(scales, steps)
    v = y / steps[..., None] + (zero_point or 0)
    oracles.assert_near_ties(codes, v, 1e-5 * np.maximum(terms / steps[..., None], 1))
    if codes.numel() > 1000:
        assert (codes.numpy() != np.rint(np.clip(v, -127, 127))).mean() < 1e-3


@examples(50)
@given(
    seeds,
    st.sampled_from([(1,), (2,), (7,), (2, 3), (0,)]),
    st.one_of(st.integers(2, 70), st.sampled_from([192, 768, 1000])),
    dtypes,
    st.sampled_from(["both", "weight", "none"]),
    st.booleans(),
    st.sampled_from([None, 0.02]),
    st.sampled_from([0.0, 1.0, -30.0]),
)
def test_layer_norm_quantize(backend, seed, lead, k, dtype, affine, smoothed, scale, offset):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*lead, k, generator=generator) * 3 + offset).to(dtype)
    if x.numel() and seed % 3 == 0:
        x.view(-1, k)[0, seed % k] = (float("nan"), float("inf"))[seed % 2]
    weight = torch.randn(k, generator=generator) if affine != "none" else None
    bias = torch.randn(k, generator=generator) if affine == "both" else None
    smooth = torch.rand(k, generator=generator) + 0.5 if smoothed else None
    zero_point = 5 if scale is not None and seed % 2 else None
    # values around 0.25 of each other's deviation: keep the variance well above eps
    out = guarded_codes(*lead, k)
    qkernels.layer_norm_quantize(x, weight, bias, 1e-5, smooth, scale, zero_point, out=out)
    check_layer_norm(x, weight, bias, smooth, scale, zero_point, out)


def test_layer_norm_of_rows_far_from_zero(backend):
    """A mean of 1,000 deviations, and a first guess of the mean far off (outlying channels): no digits are lost."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 768, generator=generator)
    x[:3] += 1000
    x[3:6] -= 300
    x[3:6, [192, 384, 767]] = 500.0
    x[6:] *= 1e-3
    weight, bias = torch.randn(768, generator=generator), torch.randn(768, generator=generator)
    check_layer_norm(x, weight, bias, None, None, None, qkernels.layer_norm_quantize(x, weight, bias, 1e-5))


def test_layer_norm_faults_reach_the_scale(backend):
    x = torch.randn(6, 50)
    x[0, 3], x[1, 49], x[3] = float("nan"), -float("inf"), 0.0
    x[2] = torch.tensor([3e19, -3e19]).repeat(25)  # a variance beyond float32, and a mean of 0
    weight, bias = torch.ones(50), torch.zeros(50)
    codes, scales = qkernels.layer_norm_quantize(x, weight, bias, 1e-5)
    assert scales[:3].isnan().all() and codes[:3].abs().sum() == 0
    assert scales[3] == 1 and codes[3].abs().sum() == 0
    assert scales[4:].isfinite().all() and codes[4:].abs().amax() == 127
    weight[7] = float("nan")
    assert qkernels.layer_norm_quantize(x, weight, bias, 1e-5)[1].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm_parameters_of_any_float_type(backend, dtype):
    x, weight, bias = torch.randn(3, 40), torch.randn(40).to(dtype), torch.randn(40).to(dtype)
    result = qkernels.layer_norm_quantize(x, weight, bias, 1e-6)
    check_layer_norm(x, weight, bias, None, None, None, result, eps=1e-6)


@pytest.mark.parametrize("k", [2, 40, 768])
def test_layer_norm_of_rows_of_one_value_is_zero(backend, k):
    x = torch.tensor([0.0, 0.1, -1000.3, 3e-20, 7e15])[:, None].expand(5, k)
    codes, scales = qkernels.layer_norm_quantize(x, torch.ones(k), None, 1e-5)
    assert not codes.any() and (scales == 1).all()


@examples(40)
@given(
    seeds,
    st.sampled_from([(), (1,), (9,), (3, 11), (0,), (200,)]),
    st.one_of(st.integers(1, 140), st.just(768)),
    dtypes,
)
def test_channel_absmax(backend, seed, lead, k, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, k, generator=generator).to(dtype)
    if x.numel() and seed % 2:
        x.view(-1)[seed % x.numel()] = (float("nan"), float("inf"), -float("inf"))[seed % 3]
    expected = np.abs(f64(x)).reshape(-1, k).max(0, initial=0)
    out = guarded((k,), torch.float32)
    assert qkernels.channel_absmax(x, out=out) is out and same(out, expected)
    running = torch.rand(k, generator=generator) * 3
    running[seed % k] = -float("nan") if seed % 5 == 0 else 1.0
    expected = np.maximum(expected, f64(running))
    assert qkernels.channel_absmax(x, running) is None and same(running, expected)


@examples(40)
@given(seeds, st.integers(1, 50), st.sampled_from([0.0, 0.15, 0.5, 1.0]))
def test_smooth_scale(backend, seed, k, strength):
    generator = torch.Generator().manual_seed(seed)
    act, weight = (torch.exp(4 * torch.randn(k, generator=generator)) for _ in range(2))
    act[seed % k], weight[(seed + 1) % k] = 0.0, 0.0
    out = guarded((k,), torch.float32)
    assert qkernels.smooth_scale(act, weight, strength, out=out) is out
    a, w = f64(act), f64(weight)
    live = (a > 0) & (w > 0)
    assert np.allclose(f64(out)[live], a[live] ** strength / w[live] ** (1 - strength), rtol=1e-6, atol=0)
    assert (f64(out)[~live] == 1).all()
