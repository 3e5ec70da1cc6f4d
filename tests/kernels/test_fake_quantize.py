"""fake_quantize: forward by bits, gradients against finite differences of the surrogate with frozen rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkernels
from tests.kernels.oracles import dtypes, examples, f32, f64, same, seeds

# shape, axis, group
SHARING = [
    ((), None, None),
    ((7,), None, None),
    ((3, 4097), None, None),
    ((5, 37), 0, None),
    ((5, 37), -1, None),
    ((150, 3), 1, None),
    ((2, 5, 9), 1, None),
    ((3, 100), None, 32),
    ((2, 3, 16), None, 16),
    ((2, 10), None, 128),
    ((9,), 0, None),
    ((4, 0), None, None),
    ((0, 6), -1, None),
]
sharing = st.sampled_from(SHARING)
RANGES = st.sampled_from([(-8, 7), (-127, 127), (0, 15), (-2, 1)])


def scales_for(shape, axis, group, generator):
    wanted = (
        ()
        if axis is None and group is None
        else (shape[axis],)
        if group is None
        else (*shape[:-1], -(-shape[-1] // group))
    )
    return torch.rand(wanted, generator=generator) * 0.4 + 0.05


def spread(values, shape, axis, group):
    """Per-scale numbers as an array of the tensor's shape."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0:
        return np.broadcast_to(values, shape)
    if group is not None:
        return np.repeat(values, group, axis=-1)[..., : shape[-1]]
    return np.broadcast_to(values.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))]), shape)


@examples(60)
@given(seeds, sharing, dtypes, RANGES, st.booleans(), st.sampled_from(["ste", "lsq"]))
def test_forward_is_bit_exact(backend, seed, how, dtype, bounds, shifted, estimator):
    shape, axis, group = how
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 2).to(dtype)
    if x.numel() and seed % 4 == 0:
        x.view(-1)[seed % x.numel()] = (float("nan"), float("inf"), -float("inf"), 1e38)[seed // 4 % 4]
    scale = scales_for(shape, axis, group, generator)
    zero = torch.randint(-3, 4, scale.shape, generator=generator, dtype=torch.int32) if shifted else None
    y = qkernels.fake_quantize(x, scale, zero, *bounds, estimator, axis, group)
    s, z = spread(f64(scale), shape, axis, group), spread(0 if zero is None else f64(zero), shape, axis, group)
    with np.errstate(over="ignore", invalid="ignore"):
        codes = np.clip(np.rint(f32(f64(x) * f32(1 / s))) + z, *bounds)
        expected = torch.from_numpy(f32((codes - z) * s)).float().to(dtype)
    assert y.dtype == dtype and same(y, f64(expected))


@examples(60)
@given(seeds, sharing, RANGES, st.booleans())
def test_lsq_gradients_are_those_of_the_surrogate(backend, seed, how, bounds, shifted):
    """f(x, s) = s * (clamp(x / s) + c), the rounding residual c held constant, by central differences in float64."""
    shape, axis, group = how
    generator = torch.Generator().manual_seed(seed)
    scale = scales_for(shape, axis, group, generator)
    zero = torch.randint(-2, 3, scale.shape, generator=generator) if shifted else None
    s, z = spread(f64(scale), shape, axis, group), spread(0 if zero is None else f64(zero), shape, axis, group)
    low, high = bounds[0] - z, bounds[1] - z
    # Points farther than 0.01 steps from the bounds, where the surrogate has no derivative, and from ties, where c
    # jumps.
    v = np.random.default_rng(seed).uniform(-12, 12, shape)
    for edge in (low, high, np.floor(v) + 0.5):
        v = np.where(np.abs(v - edge) < 0.01, v + 0.05, v)
    x = torch.from_numpy(np.asarray(v * s)).float().requires_grad_()
    scale.requires_grad_()
    g = torch.randn(shape, generator=generator)
    qkernels.fake_quantize(x, scale, zero, *bounds, "lsq", axis, group, grad_scale=0.7).backward(g)

    x64, g64, h = f64(x), f64(g), 1e-6
    clamped = np.clip(x64 / s, low, high)
    c = np.rint(clamped) - clamped
    surrogate = lambda x, s: s * (np.clip(x / s, low, high) + c)  # noqa: E731
    dx = g64 * (surrogate(x64 + h * s, s) - surrogate(x64 - h * s, s)) / (2 * h * s)
    terms = g64 * (surrogate(x64, s * (1 + h)) - surrogate(x64, s * (1 - h))) / (2 * h * s)
    assert np.allclose(f64(x.grad), dx, atol=1e-5)
    owner = spread(np.arange(scale.numel()).reshape(scale.shape), shape, axis, group).astype(int)
    sums, sizes = np.zeros(scale.numel()), np.zeros(scale.numel())
    np.add.at(sums, owner.reshape(-1), terms.reshape(-1))
    np.add.at(
        sizes, owner.reshape(-1), np.maximum(np.abs(terms), 0.5 * np.abs(g64)).reshape(-1)
    )  # a residual is up to 0.5
    assert (np.abs(f64(scale.grad).reshape(-1) - 0.7 * sums) <= 1e-5 * sizes + 1e-8).all()


@examples(30)
@given(seeds, sharing, dtypes)
def test_ste_passes_the_gradient_inside_only(backend, seed, how, dtype):
    shape, axis, group = how
    generator = torch.Generator().manual_seed(seed)
    scale = scales_for(shape, axis, group, generator).requires_grad_()
    x = (torch.randn(shape, generator=generator) * 2).to(dtype).requires_grad_()
    g = torch.randn(shape, generator=generator).to(dtype)
    qkernels.fake_quantize(x, scale, None, -8, 7, "ste", axis, group).backward(g)
    v = f32(f64(x) * f32(1 / spread(f64(scale), shape, axis, group)))
    assert same(x.grad, np.where((v >= -8) & (v <= 7), f64(g), 0)) and x.grad.dtype == dtype
    assert scale.grad is None


def test_the_bounds_are_inside_and_beyond_is_outside(backend):
    x = torch.tensor(
        [-4.0, -4.01, 3.5, 3.74, 3.76, 0.2], requires_grad=True
    )  # scale 0.5: v = -8, ..., 7, 7.48, 7.52, 0.4
    scale = torch.tensor(0.5, requires_grad=True)
    y = qkernels.fake_quantize(x, scale, None, -8, 7, "lsq")
    assert y.tolist() == [-4.0, -4.0, 3.5, 3.5, 3.5, 0.0]
    y.sum().backward()
    assert x.grad.tolist() == [1, 0, 1, 0, 0, 1]
    assert scale.grad.item() == pytest.approx(0 - 8 + 0 + 7 + 7 - 0.4, abs=1e-5)


def test_one_zero_point_for_all_scales(backend):
    x = torch.randn(3, 5)
    for scale, axis in ((torch.tensor(0.1), None), (torch.tensor([0.1]), None), (torch.full((3,), 0.1), 0)):
        wanted = qkernels.fake_quantize(x, 0.1, torch.tensor(2), -8, 7, "ste")
        for zero in (2, torch.tensor(2), torch.tensor([2])):
            assert torch.equal(qkernels.fake_quantize(x, scale, zero, -8, 7, "ste", axis), wanted)


def test_nan_stays_nan(backend):
    x = torch.tensor([1.0, float("nan"), 2.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    y = qkernels.fake_quantize(x, scale, None, -8, 7, "lsq")
    assert y.isnan().tolist() == [False, True, False]
    y.backward(torch.ones(3))
    assert x.grad.tolist() == [1, 0, 1] and scale.grad.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_of_16_bits_gets_its_gradient(backend, dtype):
    scale = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    qkernels.fake_quantize(torch.randn(50), scale, None, -8, 7, "lsq").sum().backward()
    assert scale.grad.dtype == dtype and scale.grad.isfinite()


# Not the reference: torch's own reductions are not ordered by contract.
@pytest.mark.parametrize("backend", ["scalar", "avx2", "avx512vnni"], indirect=True)
@pytest.mark.parametrize(
    "how", [((6, 5000), None, None), ((6, 5000), 0, None), ((700, 40), 1, None), ((300, 64), None, 32)]
)
def test_scale_gradient_does_not_depend_on_threads(backend, how):
    shape, axis, group = how
    generator = torch.Generator().manual_seed(0)
    x, g, scale = (
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        scales_for(shape, axis, group, generator),
    )
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            leaf = scale.clone().requires_grad_()
            qkernels.fake_quantize(x, leaf, None, -8, 7, "lsq", axis, group).backward(g)
            found.append(leaf.grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
