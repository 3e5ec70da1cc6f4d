"""PTQ4ViT: brute force on a tiny layer, a metric that never rises, gradients that are not zero, twin ranges."""

import itertools

import pytest
import torch
from torch import nn

import qclip
from qclip import models, ptq
from qclip.errors import NonFiniteError, RecipeError
from qclip.layers import Int8Linear, SimulatedLinear
from qclip.layers.activations import quantize_dequantize, quantize_twin
from qclip.ptq.curvature import Curvature, curvature
from qclip.ptq.methods.ptq4vit import LEAST, Options, Search
from qclip.recipes import Recipe, Treatment, step
from tests.small import IMAGES, small_clip

FEW = {"samples": 4, "rows": 64, "rounds": 2, "candidates": 25}


def embed(model):
    with torch.no_grad():
        return model.encode_image(IMAGES)


def distance(model, other):
    return float((1 - nn.functional.cosine_similarity(embed(model), embed(other))).mean())


def search(plan, options=None, seed=0, least=None, n=3, k=4, rows=20, squares=None):
    torch.manual_seed(seed)
    source = nn.Linear(k, n)
    x = torch.randn(rows, k) if least is None else nn.functional.gelu(2 * torch.randn(rows, k))
    site = models.Site("vision.x", "fc2", "activation", "vision.x.in", nn.Module())
    state = ptq.SiteState(site, source, plan)
    squares = torch.rand(rows, n) ** 4 if squares is None else squares
    seen = Curvature({"vision.x.in": x}, {"vision.x": squares})
    return Search([state], seen, options or Options(), least), state, x, squares


@pytest.mark.parametrize("seed", range(6))
def test_scales_are_those_of_brute_force_on_a_tiny_layer(seed):
    """Over all pairs of scales. Searching in turn may stop at a pair that no single change makes better."""
    plan, options = Treatment(3, 3, static=True, weight_scale="tensor"), Options(candidates=41, stride=1, rounds=20)
    found, state, x, squares = search(plan, options, seed)
    history = found.run()
    want, grid = x @ state.float_weight().T, plan.grid
    start_x, start_w = x.abs().max() / 3, state.float_weight().abs().max() / 3.5
    factors = torch.linspace(0.01, 1.2, 41).tolist()

    def metric(a, b):
        w = grid.decode(grid.encode(state.float_weight(), start_w * b), start_w * b)
        y = quantize_dequantize(x, 3, start_x * a) @ w.T
        return float((squares / squares.max() * (want - y) ** 2).sum())

    table = {(a, b): metric(a, b) for a, b in itertools.product([1.0, *factors], repeat=2)}
    a, b = found.factor, float(found.factors[0][0])
    assert history[-1] == pytest.approx(table[a, b], rel=1e-4) and float(state.input_scale) == pytest.approx(
        start_x * a
    )
    assert all(table[a, b] <= table[a, other] * (1 + 1e-5) for other in factors)
    assert all(table[a, b] <= table[other, b] * (1 + 1e-5) for other in factors)
    assert table[a, b] <= 1.5 * min(table.values()) and table[a, b] < table[1.0, 1.0]


def test_some_are_exactly_the_best_pair():
    """The searches above are no worse than brute force by luck: with inputs that lose nothing, they are it."""
    plan = Treatment(3, 8, static=True, weight_scale="tensor")
    found, state, x, squares = search(plan, Options(candidates=41, stride=1, rounds=9))
    found.run()
    factors, start = torch.linspace(0.01, 1.2, 41), state.float_weight().abs().max() / 3.5
    best = min(
        float(
            (
                squares
                * (x @ (state.float_weight() - plan.grid.decode(plan.grid.encode(state.float_weight(), s), s)).T) ** 2
            ).sum()
        )
        for s in [start, *(start * factors)]
    )
    mine = float((squares * (x @ (state.float_weight() - state.weight.dequantize()).T) ** 2).sum())
    assert mine <= best * 1.05


@pytest.mark.parametrize(
    "plan", [Treatment(8, 8), Treatment(4, 4), Treatment(4, 8, 32), Treatment(3, 6, weight_scale="tensor")]
)
@pytest.mark.parametrize("least", [None, LEAST["gelu"]])
def test_no_round_raises_the_metric(plan, least):
    found, _, _, _ = search(plan, Options(candidates=31), 1, least, n=8, k=48, rows=64)
    history = found.run()
    assert len(history) >= 2 and all(b <= a for a, b in itertools.pairwise(history)) and history[-1] < history[0]


@pytest.mark.parametrize("plan", [Treatment(8, 8), Treatment(4, 6), Treatment(3, 4, weight_scale="tensor")])
def test_looking_around_the_best_of_every_fifth_scale_finds_nearly_the_best_of_all(plan):
    coarse, _, _, _ = search(plan, Options(), n=8, k=48, rows=64)
    every, _, _, _ = search(plan, Options(stride=1), n=8, k=48, rows=64)
    (start, *_, left), (also, *_, best) = coarse.run(), every.run()
    assert start == also and left <= 1.1 * best
    tried_first = torch.linspace(0.01, 1.2, 101)[::5]
    assert ((coarse.factors[0] - tried_first).abs().amin(1) > 1e-3).any()  # it looks between them


def test_without_gradients_it_is_the_squared_error():
    plan = Treatment(4, 4, static=True)
    one, state, _, _ = search(plan, Options(candidates=21), squares=torch.full((20, 3), 7.0))
    other, again, _, _ = search(plan, Options(candidates=21, metric="mse"))
    one.run(), other.run()
    assert one.factor == other.factor and torch.equal(state.weight.codes, again.weight.codes)
    third, weighted, _, _ = search(plan, Options(candidates=21))
    third.run()
    assert not torch.equal(state.weight.scales, weighted.weight.scales)  # gradients do change what is found


def test_gradients_are_those_of_the_embedding_and_not_zero():
    """Against the Jacobian of the unit embedding: over draws the mean square is the diagonal of JᵀJ."""
    model = small_clip()
    towers, encoders = models.towers(model), models.encoders(model)
    recipe = Recipe("x", towers=("vision",))
    data = qclip.calibration.samples(IMAGES[:1], encoders)
    context = ptq.Context(model, recipe, towers, encoders, data, ptq.driver.states(recipe, towers), {})
    sites = [towers["vision"].sites[f"vision.blocks.1.mlp.{kind}"] for kind in ("fc1", "fc2")]
    draws = [curvature(context, data, sites, 1000, seed) for seed in range(40)]
    order = draws[0].squares["vision.blocks.1.mlp.fc2"]
    assert order.shape == (17, 64) and float(order.abs().max()) > 0
    total = sum(float(each.squares["vision.blocks.1.mlp.fc2"].sum()) for each in draws) / 40
    base, site = {}, sites[1].module

    def embedding(delta):
        hook = site.register_forward_hook(lambda _, __, y: y + delta)
        out = nn.functional.normalize(model.encode_image(IMAGES[:1]), dim=-1)[0]
        hook.remove()
        return out

    base = torch.autograd.functional.jacobian(embedding, torch.zeros(1, 17, 64))
    assert total == pytest.approx(float(base.square().sum()), rel=0.3)
    assert (draws[0].squares["vision.blocks.1.mlp.fc1"].sum(1) > 0).any()


def test_twin_ranges_have_a_step_on_either_side():
    x = torch.linspace(-0.17, 4, 5001)
    for bits in (4, 8):
        negative, scale = LEAST["gelu"] / 2 ** (bits - 1), torch.tensor(4 / (2 ** (bits - 1) - 1))
        y = quantize_twin(x, bits, scale, negative)
        assert len(y.unique()) <= 2**bits and (y[x < 0] <= 0).all() and (y.diff() >= 0).all()
        assert (y - x)[x < 0].abs().max() <= negative / 2 + 1e-6 and (y - x)[x >= 0].abs().max() <= float(
            scale
        ) / 2 + 1e-6
    gelu = nn.functional.gelu(2 * torch.randn(20000, generator=torch.Generator().manual_seed(0)))
    twin = (quantize_twin(gelu, 6, gelu.max() / 31, LEAST["gelu"] / 32) - gelu).square().mean()
    assert twin < (quantize_dequantize(gelu, 6, gelu.max() / 31) - gelu).square().mean()
    for name, least in LEAST.items():
        t = torch.linspace(-3, 0, 300_001, dtype=torch.float64)
        assert -float(models.tower.activate(t, name).min()) == pytest.approx(least, abs=1e-6)


def test_what_it_finds_is_built_counted_and_saved(tmp_path):
    model = small_clip()
    recipe = Recipe("x", Treatment(6, 6), steps=(step("ptq4vit", **FEW),))
    small = qclip.quantize(model, recipe, IMAGES)
    sites = models.towers(small)["vision"].blocks[0].sites
    fc2 = sites["fc2"].module
    assert isinstance(fc2, SimulatedLinear) and fc2.negative_step == pytest.approx(LEAST["gelu"] / 32)
    assert sites["q"].module.input_scale == sites["k"].module.input_scale
    notes = small.qclip_quantization.provenance["ptq4vit_metric"]
    assert "vision.blocks.0.attn.in a6" in notes and all(0 < left <= 1 for left in notes.values())
    assert all(not m._forward_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    assert torch.equal(embed(again), embed(small))
    assert distance(small, model) < distance(
        qclip.quantize(model, Recipe("x", Treatment(6, 6, static=True)), IMAGES), model
    )


def test_without_twins_it_runs_on_kernels_which_give_what_is_simulated():
    model = small_clip()
    small = qclip.quantize(model, Recipe("x", steps=(step("ptq4vit", twin=False, **FEW),)), IMAGES)
    assert qclip.coverage(small).share("simulated") == 0
    assert distance(small, model) < 1e-3
    layers = [site.module for site in models.towers(small)["vision"] if isinstance(site.module, Int8Linear)]
    assert len(layers) == 13 and all(layer.input_scale is not None for layer in layers)
    for layer in layers:
        parts = (layer.quantized.canonical(), layer.bias, layer.transforms, layer.input_scale)
        x = 2 * torch.randn(9, layer.shape[1])
        want = SimulatedLinear(*parts, grid=layer.grid, activation_bits=8)(x)
        assert (layer(x) - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize(
    ("treatment", "word"),
    [
        (Treatment(8, 16), r"searches scales of inputs, and that of vision\.\S+ is float \(a16\); use 2 to 8"),
        (Treatment(static=True, activation_grid="asym"), "drop activation_grid and activation_observer"),
        (Treatment(weight_observer="mse"), "drop weight_observer"),
    ],
)
def test_what_does_not_fit_is_named(treatment, word):
    with pytest.raises(RecipeError, match=word):
        qclip.quantize(small_clip(), Recipe("x", treatment, steps=(step("ptq4vit", **FEW),)), IMAGES)
    with pytest.raises(RecipeError, match="candidates must be 2 or more"):
        step("ptq4vit", candidates=1)
    with pytest.raises(RecipeError, match="both decide the weights"):
        Recipe("x", steps=(step("ptq4vit"), step("hqq")))


def test_dead_inputs_and_those_that_are_not_finite():
    model = small_clip()
    with torch.no_grad():
        model.visual.transformer.resblocks[0].mlp.c_fc.weight.zero_()
        model.visual.transformer.resblocks[0].mlp.c_fc.bias.zero_()
    small = qclip.quantize(model, Recipe("x", steps=(step("ptq4vit", **FEW),), towers=("vision",)), IMAGES)
    assert embed(small).isfinite().all() and distance(small, model) < 0.01
    with torch.no_grad():
        model.visual.transformer.resblocks[1].mlp.c_fc.weight.mul_(1e38)
    with pytest.raises(NonFiniteError, match=r"vision\.\S+ is NaN or Inf"):
        qclip.quantize(model, Recipe("x", steps=(step("ptq4vit", **FEW),), towers=("vision",)), IMAGES)


@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("scale", ["channel", "tensor"])
def test_what_cannot_be_bettered_is_kept(scale, stride):
    """Weights and inputs that lie on their codes: no candidate is 1, and every other scale errs."""
    plan, options = Treatment(5, 5, static=True, weight_scale=scale), Options(candidates=31, stride=stride)
    g = torch.Generator().manual_seed(0)
    source, x = nn.Linear(24, 6), torch.randint(-15, 16, (40, 24), generator=g).float()
    with torch.no_grad():
        source.weight.copy_(torch.randint(-15, 16, (6, 24), generator=g))
        source.weight[:, 0], x[0, 0] = 15, 15
    site = models.Site("vision.x", "fc1", "norm", "vision.x.in", nn.Module())
    state = ptq.SiteState(site, source, plan)
    found = Search([state], Curvature({"vision.x.in": x}, {"vision.x": torch.rand(40, 6, generator=g)}), options, None)
    assert not any(abs(float(each) - 1) < 1e-6 for each in found.candidates)
    history = found.run()
    assert history == [0.0] * len(history) and found.factor == 1.0 and (found.factors[0] == 1).all()
    assert torch.equal(state.weight.dequantize(), source.weight) and float(state.input_scale) == 1.0
