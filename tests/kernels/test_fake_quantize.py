"""fake_quantize: forward by bits; gradients against finite differences of the surrogate with frozen rounding and, where
an estimator is no derivative, against its paper's formula in torch's autograd in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qkernels
from qkernels import dispatch, reference
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
ESTIMATORS = ("ste", "lsq", "lsq_plus", "ewgs", "pact", "dorefa")
OFFSET = ("lsq_plus", "ewgs")


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


def zeros_for(scale, estimator, generator):
    """Integers, or offsets in units of x, or nothing."""
    if estimator in OFFSET:
        return torch.randn(scale.shape, generator=generator) * 0.3
    if estimator in ("ste", "lsq"):
        return torch.randint(-3, 4, scale.shape, generator=generator, dtype=torch.int32)
    return None


@examples(100)
@given(seeds, sharing, dtypes, RANGES, st.booleans(), st.sampled_from(ESTIMATORS))
def test_forward_is_bit_exact(backend, seed, how, dtype, bounds, shifted, estimator):
    shape, axis, group = how
    generator = torch.Generator().manual_seed(seed)
    scale = scales_for(shape, axis, group, generator)
    zero = zeros_for(scale, estimator, generator) if shifted else None
    s, z = spread(f64(scale), shape, axis, group), spread(0 if zero is None else f64(zero), shape, axis, group)
    v = np.random.default_rng(seed).uniform(-12, 12, shape)
    if seed % 2:  # near ties, where the order of the roundings decides
        v = np.floor(v) + 0.5
    x = torch.from_numpy(np.asarray(v * s + (z if estimator in OFFSET else 0))).to(dtype)
    if x.numel() and seed % 4 == 0:
        x.view(-1)[seed % x.numel()] = (float("nan"), float("inf"), -float("inf"), 1e38)[seed // 4 % 4]
    y = qkernels.fake_quantize(x, scale, zero, *bounds, estimator, axis, group)
    with np.errstate(over="ignore", invalid="ignore"):
        if estimator in OFFSET:
            codes = np.rint(np.clip(f32(f32(f64(x) - z) * f32(1 / s)), *bounds))
            expected = f32(f32(codes * s) + z)
        else:
            codes = np.clip(np.rint(f32(f64(x) * f32(1 / s))) + z, *bounds)
            expected = f32((codes - z) * s)
    assert y.dtype == dtype and same(y, f64(torch.from_numpy(expected).float().to(dtype)))


def by_differences(x, s, z, bounds, estimator):
    """Slopes of y with x, s and z: of the surrogate whose rounding residual, in the estimator's unit, is held constant,
    by central differences in float64."""
    low, high = bounds if estimator == "lsq_plus" else (bounds[0] - z, bounds[1] - z)

    def surrogate(x, s, z, residual=None):
        clamped = np.clip((x - z if estimator == "lsq_plus" else x) / s, low, high)
        if residual is None:
            return np.rint(clamped) - clamped
        offset = z if estimator == "lsq_plus" else 0
        return s * clamped + offset + (frozen_scale if estimator == "pact" else s) * residual

    frozen_scale, h = s, 1e-6
    c = surrogate(x, s, z)
    slope = lambda dx, ds, dz: (  # noqa: E731
        (surrogate(x + h * dx, s + h * ds, z + h * dz, c) - surrogate(x - h * dx, s - h * ds, z - h * dz, c)) / (2 * h)
    )
    return slope(1, 0, 0), slope(0, 1, 0), slope(0, 0, 1)


class EwgsRound(torch.autograd.Function):
    """Equation 5 of the paper on the grid [0, 1]."""

    @staticmethod
    def forward(ctx, a, levels, delta):
        q = torch.round(a * levels) / levels
        ctx.save_for_backward(a - q)
        ctx.delta = delta
        return q

    @staticmethod
    def backward(ctx, g):
        return g * (1 + ctx.delta * torch.sign(g) * ctx.saved_tensors[0]), None, None


def by_ewgs(x, s, z, bounds, g, delta):
    """Gradients value by value, through the paper's own forward half with learned ends l and h."""
    x, s, z = (torch.from_numpy(np.array(value)).requires_grad_() for value in (x, s, z))
    l, h = z + bounds[0] * s, z + bounds[1] * s  # noqa: E741
    a = ((x - l) / (h - l)).clamp(0, 1)
    y = (h - l) * EwgsRound.apply(a, bounds[1] - bounds[0], delta) + l
    y.backward(torch.from_numpy(g))
    return x.grad.numpy(), s.grad.numpy(), z.grad.numpy()


@examples(100)
@given(seeds, sharing, RANGES, st.booleans(), st.sampled_from(["lsq", "lsq_plus", "ewgs", "pact"]))
def test_gradients(backend, seed, how, bounds, shifted, estimator):
    shape, axis, group = how
    generator = torch.Generator().manual_seed(seed)
    scale = scales_for(shape, axis, group, generator)
    zero = zeros_for(scale, estimator, generator) if shifted else None
    s, z = spread(f64(scale), shape, axis, group), spread(0 if zero is None else f64(zero), shape, axis, group)
    low, high = bounds if estimator in OFFSET else (bounds[0] - z, bounds[1] - z)
    # Points farther than 0.01 steps from the bounds, where the surrogate has no derivative, and from ties, where the
    # residual jumps.
    v = np.random.default_rng(seed).uniform(-14, 14, shape)
    for edge in (low, high, np.floor(v) + 0.5):
        v = np.where(np.abs(v - edge) < 0.01, v + 0.05, v)
    x = torch.from_numpy(np.asarray(v * s + (z if estimator in OFFSET else 0))).float().requires_grad_()
    scale.requires_grad_()
    if zero is not None and estimator in OFFSET:
        zero.requires_grad_()
    g, delta = torch.randn(shape, generator=generator), 0.3 if estimator == "ewgs" else 0.0
    qkernels.fake_quantize(x, scale, zero, *bounds, estimator, axis, group, grad_scale=0.7, delta=delta).backward(g)

    x64, g64 = f64(x), f64(g)
    if estimator == "ewgs":
        dx, ds, dz = by_ewgs(x64, s, z, bounds, g64, delta)
    else:
        dx, ds, dz = (g64 * slope for slope in by_differences(x64, s, z, bounds, estimator))
    assert np.allclose(f64(x.grad), dx, rtol=1e-5, atol=1e-5)
    owner = spread(np.arange(scale.numel()).reshape(scale.shape), shape, axis, group).astype(int).reshape(-1)
    for leaf, terms in ((scale, ds), (zero, dz)):
        if leaf is None or not leaf.requires_grad:
            continue
        sums, sizes = np.zeros(scale.numel()), np.zeros(scale.numel())
        np.add.at(sums, owner, terms.reshape(-1))
        # A residual is up to 0.5 steps, whatever the term is.
        np.add.at(sizes, owner, np.maximum(np.abs(terms), 0.5 * np.abs(g64)).reshape(-1))
        assert (np.abs(f64(leaf.grad).reshape(-1) - 0.7 * sums) <= 1e-5 * sizes + 1e-8).all()


@examples(60)
@given(seeds, sharing, dtypes, st.sampled_from(ESTIMATORS))
def test_which_values_pass_their_gradient(backend, seed, how, dtype, estimator):
    """EWGS with delta 0 passes it as it is."""
    shape, axis, group = how
    generator = torch.Generator().manual_seed(seed)
    scale = scales_for(shape, axis, group, generator).requires_grad_()
    x = (torch.randn(shape, generator=generator) * 2).to(dtype).requires_grad_()
    g = torch.randn(shape, generator=generator).to(dtype)
    qkernels.fake_quantize(x, scale, None, -8, 7, estimator, axis, group).backward(g)
    v = f32(f64(x) * f32(1 / spread(f64(scale), shape, axis, group)))
    inside = (v > -8) & (v < 7) if estimator == "pact" else (v >= -8) & (v <= 7)
    assert same(x.grad, np.where(inside | (estimator == "dorefa"), f64(g), 0)) and x.grad.dtype == dtype
    assert (scale.grad is None) == (estimator in ("ste", "dorefa"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ewgs_in_16_bits(backend, dtype):
    """Computed in float32 and rounded once: as the gradients of the same values in float32, but for one last place."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(3, 90, generator=generator), torch.randn(3, 90, generator=generator))
    found = []
    for wide in (True, False):
        x, g = (value.to(dtype).float() if wide else value.to(dtype) for value in values)
        x.requires_grad_()
        qkernels.fake_quantize(x, 0.2, 0.05, 0, 15, "ewgs", delta=0.5).backward(g)
        found.append(x.grad)
    assert found[1].dtype == dtype
    assert torch.allclose(found[1].float(), found[0].to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=0)


def test_pact_as_its_paper_says(backend):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 33, generator=generator) * 4).requires_grad_()
    alpha = torch.tensor(3.75, requires_grad=True)
    y = qkernels.fake_quantize(x, alpha / 15, None, 0, 15, "pact")
    g = torch.randn(5, 33, generator=generator)
    y.backward(g)
    with torch.no_grad():
        assert torch.allclose(y, torch.round(x.clamp(0, 3.75) * 15 / alpha) * alpha / 15, atol=1e-6)
        assert torch.equal(x.grad, torch.where((x > 0) & (x < alpha), g, 0.0))
        assert torch.allclose(alpha.grad, g.double()[x >= alpha].sum().float(), rtol=1e-5)


class IdentityRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return torch.round(t)

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_dorefa_as_its_paper_says(backend, bits):
    """Weights: tanh and the maximum are differentiated outside, rounding is the identity."""
    levels = 2**bits - 1
    generator = torch.Generator().manual_seed(bits)
    w, g = torch.randn(7, 40, generator=generator), torch.randn(7, 40, generator=generator)
    grads = []
    for quantize, leaf in (
        (lambda t: qkernels.fake_quantize(t, 1 / levels, None, 0, levels, "dorefa"), w.clone().requires_grad_()),
        (lambda t: IdentityRound.apply(t * levels) / levels, w.double().requires_grad_()),
    ):
        squashed = torch.tanh(leaf)
        y = 2 * quantize(squashed / (2 * squashed.abs().max()) + 0.5) - 1
        y.backward(g.to(y.dtype))
        grads.append((y.detach().double(), leaf.grad.double()))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-6)
    assert torch.allclose(grads[0][1], grads[1][1], atol=1e-5)


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


def test_the_bounds_of_pact_belong_to_alpha(backend):
    x = torch.tensor([-0.5, 0.0, 0.1, 3.5, 3.6], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    qkernels.fake_quantize(x, scale, None, 0, 7, "pact").sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 0, 0] and scale.grad == 14
    x, scale.grad = torch.tensor([-3.6, -3.5, -0.1, 0.0, 3.5], requires_grad=True), None
    qkernels.fake_quantize(x, scale, None, -7, 7, "pact").sum().backward()  # signed
    assert x.grad.tolist() == [0, 0, 1, 1, 0] and scale.grad == -7


def test_one_zero_point_for_all_scales(backend):
    x = torch.randn(3, 5)
    for scale, axis in ((torch.tensor(0.1), None), (torch.tensor([0.1]), None), (torch.full((3,), 0.1), 0)):
        wanted = qkernels.fake_quantize(x, 0.1, torch.tensor(2), -8, 7, "ste")
        for zero in (2, torch.tensor(2), torch.tensor([2])):
            assert torch.equal(qkernels.fake_quantize(x, scale, zero, -8, 7, "ste", axis), wanted)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nan_stays_nan(backend, estimator):
    x = torch.tensor([1.0, float("nan"), 2.0], requires_grad=True)
    scale, offset = torch.tensor(0.5, requires_grad=True), torch.tensor(0.25, requires_grad=True)
    y = qkernels.fake_quantize(x, scale, offset if estimator in OFFSET else None, -8, 7, estimator)
    assert y.isnan().tolist() == [False, True, False]
    y.backward(torch.ones(3))
    assert x.grad.tolist() == [1, estimator == "dorefa", 1]
    assert scale.grad is None if estimator in ("ste", "dorefa") else scale.grad.isnan()
    assert offset.grad.isnan() if estimator in OFFSET else offset.grad is None


@pytest.mark.parametrize("how", [((5,), None, None), ((3, 5), 0, None), ((3, 5), 1, None), ((3, 5), None, 4)])
@pytest.mark.parametrize("estimator", ["lsq", "lsq_plus", "ewgs", "pact"])
def test_a_scale_of_zero_gets_the_gradient_of_values_outside(backend, estimator, how):
    """1 / 0 is Inf and 0 * Inf is NaN: what is read beside the values, as padding, must add nothing."""
    shape, axis, group = how
    scale = torch.zeros_like(scales_for(shape, axis, group, torch.Generator())).requires_grad_()
    qkernels.fake_quantize(torch.ones(shape), scale, None, -8, 7, estimator, axis, group).sum().backward()
    assert scale.grad.sum() == 7 * np.prod(shape)


@pytest.mark.parametrize("estimator", ["ste", "lsq", "lsq_plus"])
def test_what_has_no_gradient_has_no_room(backend, estimator):
    """A backend that is asked without `out` gives what the reference gives, also where the offset is not there."""
    grad, x, scale = torch.ones(3, 5), torch.randn(3, 5), torch.full((3,), 0.5)
    arguments = grad, x, scale, None, -8, 7, estimator, 0
    found = dispatch.select("fake_quantize_backward", x.device, *arguments)(*arguments)
    wanted = reference.fake_quantize_backward(*arguments)
    assert [t.shape for t in found] == [t.shape for t in wanted]
    assert found[2].shape == (0,) and found[1].shape == ((0,) if estimator == "ste" else (3,))


def test_an_offset_for_all_scales(backend):
    """One number, a tensor of one element and one a scale; its gradient has its own shape and dtype."""
    generator = torch.Generator().manual_seed(0)
    x, scale = torch.randn(3, 50, generator=generator) * 2, torch.full((3,), 0.1)
    wanted = qkernels.fake_quantize(x, scale, torch.full((3,), 0.5), 0, 15, "lsq_plus", 0)
    for zero in (0.5, torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor([[0.5]])):
        leaf = zero.clone().requires_grad_() if isinstance(zero, torch.Tensor) else None
        y = qkernels.fake_quantize(x.requires_grad_(), scale, zero if leaf is None else leaf, 0, 15, "lsq_plus", 0)
        assert torch.equal(y, wanted)
        if leaf is not None:
            y.sum().backward()
            v = (x.detach() - 0.5) / 0.1
            assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype
            assert leaf.grad.item() == pytest.approx(((v < 0) | (v > 15)).sum().item(), rel=2**-8)


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
@pytest.mark.parametrize("estimator", ["lsq", "lsq_plus", "ewgs", "pact"])
def test_gradients_do_not_depend_on_threads(backend, how, estimator):
    shape, axis, group = how
    generator = torch.Generator().manual_seed(0)
    x, g, scale = (
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        scales_for(shape, axis, group, generator),
    )
    offset = torch.randn(scale.shape, generator=generator) if estimator in OFFSET else None
    delta = 0.3 if estimator == "ewgs" else 0.0
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            leaves = [leaf.clone().requires_grad_() for leaf in (x, scale, offset) if leaf is not None]
            zero = leaves[2] if estimator in OFFSET else None
            qkernels.fake_quantize(*leaves[:2], zero, -8, 7, estimator, axis, group, delta=delta).backward(g)
            found.append([leaf.grad for leaf in leaves])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
