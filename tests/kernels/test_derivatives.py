"""Derivatives and vmap of every op: right, or refused in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap  # noqa: F401

import qkernels
from qkernels import Int4Weight, Int8Weight

SEED = torch.Generator().manual_seed(0)
X = torch.randn(3, 48, generator=SEED)
W = torch.randn(24, 48, generator=SEED)
W8, W4 = qkernels.pack(Int8Weight.quantize(W)), qkernels.pack(Int4Weight.quantize(W, group=32))
CODES, SCALES = qkernels.quantize_per_token(X)
QKV = torch.randn(2, 5, 3, 16, generator=SEED)
IMAGES = torch.randn(2, 3, 8, 8, generator=SEED)

#: Every op without a derivative, as a function of one float tensor that a caller might want a gradient of.
INTEGER_OPS = {
    "quantize_per_token": (lambda x: qkernels.quantize_per_token(x), X),
    "quantize_per_token, static": (lambda x: qkernels.quantize_per_token(x, scale=0.1), X),
    "quantize_patches": (lambda x: qkernels.quantize_patches(x, 4), IMAGES),
    "layer_norm_quantize": (lambda x: qkernels.layer_norm_quantize(x, None, None, 1e-5), X),
    "layer_norm_quantize, weight": (lambda w: qkernels.layer_norm_quantize(X, w, w, 1e-5), torch.ones(48)),
    "int8_linear": (lambda s: qkernels.int8_linear(CODES, s, W8), SCALES),
    "int8_linear, groups": (lambda s: qkernels.int8_linear(CODES, s, W8, out_group=128), SCALES),
    "int8_linear, bias": (lambda b: qkernels.int8_linear(CODES, SCALES, W8, b), torch.ones(24)),
    "int8_linear, residual": (
        lambda r: qkernels.int8_linear(CODES, SCALES, W8, residual=r),
        torch.ones(3, 24),
    ),
    "int4_linear, codes": (lambda s: qkernels.int4_linear(CODES, s, W4), SCALES),
    "int4_linear, float": (lambda x: qkernels.int4_linear(x, None, W4), X),
    "attention": (lambda q: qkernels.attention(q, QKV, QKV), QKV),
    "attention, codes": (lambda q: qkernels.attention(QKV, q, QKV, out_dynamic=True), QKV),
    "channel_absmax": (lambda x: qkernels.channel_absmax(x), X),
    "smooth_scale": (lambda a: qkernels.smooth_scale(a, torch.ones(48), 0.5), torch.ones(48)),
}


def floats(result):
    """The results that can carry a gradient, as one number."""
    found = [result] if isinstance(result, torch.Tensor) else result
    return sum(part.sum() for part in found if part.is_floating_point())


def refused(name):
    return pytest.raises(RuntimeError, match=f"^{name.split(',')[0]}: integer ops have no gradient; .* float model")


@pytest.mark.parametrize("name", INTEGER_OPS)
def test_integer_ops_refuse_a_gradient_when_it_is_asked_for(name):
    function, x = INTEGER_OPS[name]
    leaf = x.clone().requires_grad_()
    result = function(leaf)  # works, and equals what it is without a gradient
    for with_gradient, without in zip(
        *(r if isinstance(r, tuple) else (r,) for r in (result, function(x))), strict=True
    ):
        assert torch.equal(with_gradient, without) and not without.requires_grad
        assert with_gradient.requires_grad == with_gradient.is_floating_point()
    with refused(name):
        floats(result).backward()
    assert leaf.grad is None


@pytest.mark.parametrize("name", INTEGER_OPS)
@pytest.mark.parametrize("how", ["grad", "jvp", "dual numbers", "compiled"])
def test_integer_ops_refuse_every_derivative(name, how):
    function, x = INTEGER_OPS[name]
    if how == "compiled":
        torch._dynamo.reset()
        leaf = x.clone().requires_grad_()
        result = torch.compile(lambda t: floats(function(t)), fullgraph=True, backend="aot_eager")(leaf)
        assert torch.equal(result, floats(function(x)))
        with refused(name):
            result.backward()
        return
    with refused(name):
        if how == "grad":
            grad(lambda t: floats(function(t)))(x)
        elif how == "jvp":
            jvp(lambda t: floats(function(t)), (x,), (torch.ones_like(x),))
        else:
            with forward_ad.dual_level():
                function(forward_ad.make_dual(x, torch.ones_like(x)))


def test_where_nothing_asks_for_a_gradient_nothing_has_one():
    leaf = X.clone().requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not any(part.requires_grad for part in qkernels.quantize_per_token(leaf))
    running = torch.zeros(48)
    qkernels.channel_absmax(leaf, running)
    torch.ops.qkernels.channel_absmax_(leaf, running)
    assert not running.requires_grad and torch.equal(running, qkernels.channel_absmax(X))


def test_out_carries_no_derivative():
    leaf, out = X.clone().requires_grad_(), torch.empty(3, 48)
    for call in (
        lambda x: qkernels.hadamard_transform(x, out=out),
        lambda x: torch.ops.qkernels.hadamard_transform_out(x, False, out=[out]),
    ):
        with pytest.raises(RuntimeError, match="hadamard_transform: out= carries no derivative"):
            call(leaf)
        with torch.no_grad():
            call(leaf)
    with pytest.raises(RuntimeError, match="out= carries no derivative"):
        vmap(lambda x: qkernels.hadamard_transform(x, out=out[0]))(X)


# -- hadamard_transform: linear, so everything is right -------------------------------------------------------


def test_hadamard_forward_mode(backend):
    t = torch.randn(3, 48)
    y, tangent = jvp(qkernels.hadamard_transform, (X,), (t,))
    assert torch.equal(y, qkernels.hadamard_transform(X)) and torch.equal(tangent, qkernels.hadamard_transform(t))
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(qkernels.hadamard_transform(forward_ad.make_dual(X, t), transpose=True))
    assert torch.equal(tangent, qkernels.hadamard_transform(t, transpose=True))


def test_hadamard_derivatives_of_higher_order(backend):
    """f(x) = sum (T x)^4 has the gradient T^t 4 (T x)^3 and the Hessian T^t 12 (T x)^2 T."""
    t = torch.stack([qkernels.hadamard_transform(row) for row in torch.eye(24)]).T
    x = torch.randn(24)

    def f(x):
        return qkernels.hadamard_transform(x).pow(4).sum()

    wanted = t.T @ torch.diag(12 * (t @ x).square()) @ t
    assert torch.allclose(grad(f)(x), 4 * t.T @ (t @ x).pow(3), atol=1e-3)
    for found in (hessian(f)(x), jacfwd(jacrev(f))(x), jacrev(jacrev(f))(x), torch.autograd.functional.hessian(f, x)):
        assert torch.allclose(found, wanted, atol=1e-3)
    assert torch.allclose(vjp(qkernels.hadamard_transform, x)[1](x)[0], t.T @ x, atol=1e-5)
    assert torch.allclose(vmap(grad(f))(torch.stack([x, 2 * x]))[1], 8 * 4 * t.T @ (t @ x).pow(3), atol=1e-2)


# -- fake_quantize -----------------------------------------------------------------------------------------------------

ESTIMATORS = {
    "ste": {},
    "lsq": {},
    "lsq_plus": {"zero_point": torch.tensor(0.3)},
    "ewgs": {"zero_point": torch.tensor(0.3)},
    "pact": {},
    "dorefa": {},
}


def surrogate(x, scale, zero_point, qmin, qmax, estimator):
    """The same numbers in torch's own autograd: rounding passes its gradient on (Esser et al. 2019, appendix A)."""

    def rounded(v):
        return v + (torch.round(v) - v).detach()

    if estimator == "dorefa":
        return x + (scale * torch.round(x / scale).clamp(qmin, qmax) - x).detach()
    if estimator in ("lsq_plus", "ewgs"):
        return scale * rounded(torch.clamp((x - zero_point) / scale, qmin, qmax)) + zero_point
    if estimator == "ste":
        scale = scale.detach()
    if estimator == "pact":  # clipping has the gradient, rounding none
        v = torch.clamp(x, scale * qmin, scale * qmax)
        return v + (scale * torch.round(v / scale) - v).detach()
    return scale * rounded(torch.clamp(x / scale, qmin, qmax))


def arguments(estimator):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 7, generator=generator) * 2, torch.tensor(0.5), torch.tensor(0.3)


def both(estimator):
    """fake_quantize and its surrogate as functions of (x, scale, zero point)."""

    def ours(x, scale, zero):
        return qkernels.fake_quantize(x, scale, zero if ESTIMATORS[estimator] else None, -3, 4, estimator)

    return ours, lambda x, scale, zero: surrogate(x, scale, zero, -3, 4, estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fake_quantize_derivatives_are_those_of_the_surrogate(backend, estimator):
    """Reverse, forward and second derivatives of a curved function of the result, by all of x, scale and offset."""
    ours, theirs = both(estimator)
    at, steps = arguments(estimator), tuple(torch.randn_like(t) for t in arguments(estimator))
    assert torch.allclose(ours(*at), theirs(*at), atol=1e-6)
    found, wanted = [], []
    for function, results in ((ours, found), (theirs, wanted)):

        def loss(*args, function=function):
            return (function(*args).pow(3) * torch.linspace(-1, 1, 28).view(4, 7)).sum()

        gradient = grad(loss, argnums=(0, 1, 2))
        results += [*gradient(*at), jvp(function, at, steps)[1], *jvp(gradient, at, steps)[1]]
        results += [*vjp(gradient, *at)[1](steps)]
        leaves = [t.clone().requires_grad_() for t in at]
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True, materialize_grads=True)
        results += torch.autograd.grad(first, leaves, steps, materialize_grads=True)
        with forward_ad.dual_level():
            dual = function(*(forward_ad.make_dual(t, step) for t, step in zip(at, steps, strict=True)))
            results.append(forward_ad.unpack_dual(dual).tangent)
    for number, (ours_found, theirs_found) in enumerate(zip(found, wanted, strict=True)):
        assert torch.allclose(ours_found, theirs_found, rtol=1e-4, atol=1e-4), number


def test_double_backward_of_a_square():
    """The issue's case: the second derivative of fake_quantize(x)^2 is 2 inside, 0 outside."""
    x = torch.tensor([-9.0, -0.2, 0.3, 0.7, 9.0], requires_grad=True)
    first = torch.autograd.grad(qkernels.fake_quantize(x, 0.5, None, -8, 7, "ste").square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first[0].sum(), x)[0].tolist() == [0, 2, 2, 2, 0]


@pytest.mark.parametrize("how", [{"axis": 0}, {"axis": 1}, {"group": 4}])
@pytest.mark.parametrize("estimator", ["lsq", "lsq_plus"])
def test_forward_mode_is_the_transpose_of_reverse_mode(backend, how, estimator):
    """<G, J t> = <J^t G, t>, with grad_scale in both, for shared scales and offsets."""
    x, g, t = (torch.randn(3, 10) for _ in range(3))
    shape = (3, 3) if "group" in how else (x.shape[how["axis"]],)
    scale, zero = torch.rand(shape) + 0.2, torch.randn(shape)
    steps = t, torch.randn(shape), torch.randn(shape)

    def f(x, scale, zero):
        offset = zero if estimator == "lsq_plus" else None
        return qkernels.fake_quantize(x, scale, offset, -3, 4, estimator, grad_scale=0.7, **how)

    y, forward = jvp(f, (x, scale, zero), steps)
    reverse = vjp(f, x, scale, zero)[1](g)
    assert (g * forward).sum() == pytest.approx(
        sum((a * b).sum() for a, b in zip(reverse, steps, strict=True)).item(), rel=1e-4, abs=1e-4
    )
    assert torch.equal(y, f(x, scale, zero))


def test_what_ewgs_cannot_is_refused():
    """Its gradient takes |G|, so it is no linear map of the incoming gradient."""
    x = torch.randn(5)

    def f(x, delta):
        return qkernels.fake_quantize(x, 0.5, torch.tensor(0.1), -3, 4, "ewgs", delta=delta).square().sum()

    for call in (
        lambda delta: jvp(lambda x: f(x, delta), (x,), (x,)),
        lambda delta: jvp(grad(lambda x: f(x, delta)), (x,), (x,)),
        lambda delta: hessian(lambda x: f(x, delta))(x),
        lambda delta: torch.autograd.functional.hessian(lambda x: f(x, delta), x),
    ):
        with pytest.raises(RuntimeError, match="fake_quantize: 'ewgs' has no .* derivative, because its gradient"):
            call(0.2)
        call(0.0)
    assert torch.isfinite(grad(f)(x, 0.2)).all()


def test_compiled_forward_mode_is_that_of_eager():
    """Dynamo gives up on it and goes on with the frames below, which must not be traced: kernels get addresses."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: jvp(qkernels.hadamard_transform, (x,), (x,))[1], backend=backend)
    inputs = [X, 3 * X - 1, X.flip(0)]
    found = [compiled(x) for x in inputs]
    for x, tangent in zip(inputs, found, strict=True):
        assert torch.equal(tangent, qkernels.hadamard_transform(x)) and tangent.abs().max() > 0
    called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.empty not in called and torch.empty_like not in called  # what ops do within


# -- vmap --------------------------------------------------------------------------------------------------------------

VMAPS = {
    "quantize_per_token": (lambda x, s: qkernels.quantize_per_token(x, s), (4, 3, 48), (4, 48)),
    "quantize_patches": (lambda x: qkernels.quantize_patches(x, 4), (4, 2, 3, 8, 8)),
    "layer_norm_quantize": (lambda x, w: qkernels.layer_norm_quantize(x, w, None, 1e-5), (4, 3, 48), (4, 48)),
    "int8_linear": (
        lambda x, b: qkernels.int8_linear(*qkernels.quantize_per_token(x), W8, b, out_group=128),
        (4, 3, 48),
        (4, 24),
    ),
    "int8_linear, weights": (
        lambda x, b: qkernels.int8_linear(CODES, SCALES, Int8Weight(W8.codes, x.abs(), (24, 48), W8.layout), b),
        (4, 24),
        (4, 24),
    ),
    "int4_linear": (
        lambda x, r: qkernels.int4_linear(x, None, W4, None, "gelu", r),
        (4, 3, 48),
        (4, 3, 24),
    ),
    "attention": (lambda q, m: qkernels.attention(q, q, q, m), (4, 2, 5, 3, 16), (4, 5, 5)),
    "channel_absmax": (lambda x: qkernels.channel_absmax(x), (4, 3, 48)),
    "smooth_scale": (lambda a, b: qkernels.smooth_scale(a.abs(), b.abs(), 0.5), (4, 48), (4, 48)),
    "fake_quantize": (
        lambda x, s: qkernels.fake_quantize(x, s.abs() + 0.1, None, -8, 7, "lsq", axis=0),
        (4, 3, 48),
        (4, 3),
    ),
    "hadamard_transform": (lambda x: qkernels.hadamard_transform(x, transpose=True), (4, 3, 48)),
}


@pytest.mark.parametrize("name", VMAPS)
def test_vmap_is_one_call_per_element(name):
    function, *shapes = VMAPS[name]
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    alone = [function(*(t[i] for t in inputs)) for i in range(4)]
    alone = [r if isinstance(r, tuple) else (r,) for r in alone]
    for dim in (0, -1):
        result = vmap(function, in_dims=dim)(*(t.movedim(0, dim) for t in inputs))
        for number, part in enumerate(result if isinstance(result, tuple) else (result,)):
            assert torch.equal(part, torch.stack([r[number] for r in alone]))
    leading, *others = inputs
    assert floats(vmap(function, in_dims=(0, *[None] * len(others)))(leading, *(t[0] for t in others))).isfinite()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: floats(vmap(function)(*args)), backend="aot_eager")(*inputs)
    assert torch.allclose(compiled, floats(vmap(function)(*inputs)))


def test_vmap_of_raw_ops_and_within_itself():
    x = torch.randn(2, 4, 3, 48)
    wanted = qkernels.hadamard_transform(x)
    assert torch.equal(vmap(vmap(qkernels.hadamard_transform))(x), wanted)
    assert torch.equal(vmap(vmap(lambda t: torch.ops.qkernels.hadamard_transform(t, False)))(x), wanted)
    with pytest.raises(RuntimeError, match="channel_absmax: torch.vmap over an axis of size 0"):
        vmap(qkernels.channel_absmax)(x[:0])


def test_raw_ops_under_torch_func_are_refused():
    with pytest.raises(RuntimeError, match="call qkernels.hadamard_transform"):
        grad(lambda x: torch.ops.qkernels.hadamard_transform(x, False).sum())(X)
    with forward_ad.dual_level():
        y = torch.ops.qkernels.hadamard_transform(forward_ad.make_dual(X, X), False)
        assert torch.equal(forward_ad.unpack_dual(y).tangent, qkernels.hadamard_transform(X))
