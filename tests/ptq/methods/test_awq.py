"""AWQ: the strength is the grid's optimum when it is computed again, clipping never errs more, kernels run it."""

import dataclasses

import pytest
import torch
from torch import nn

import qclip
from qclip import calibration, models, ptq, recipes
from qclip.errors import NonFiniteError, RecipeError
from qclip.layers import Scale, SimulatedLinear
from qclip.layers.activations import quantize_dequantize
from qclip.ptq.methods import awq
from qclip.ptq.methods.awq import STRENGTHS, channel_scale
from qclip.recipes import Recipe, Treatment, step
from qkernels import weights
from tests.small import IMAGES, TEXTS, small_clip

SITES = ("vision.blocks.0.attn.q", "vision.blocks.0.attn.k", "vision.blocks.0.attn.v")


def embed(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.encode_image(IMAGES), model.encode_text(model.tokenizer(TEXTS))


def with_loud_channels(model: nn.Module) -> nn.Module:
    """A few channels whose inputs are large: what AWQ is for."""
    with torch.no_grad():
        for block in model.visual.transformer.resblocks:
            for norm in (block.ln_1, block.ln_2):
                norm.weight[::9] *= 8
    return model


def decided(treatment: Treatment, seed: int = 0, **options) -> ptq.Context:
    model = with_loud_channels(small_clip(seed))
    recipe = Recipe("x", treatment, steps=(step("awq", **options),), towers=("vision",))
    towers, encoders = models.towers(model), models.encoders(model)
    data = calibration.samples(IMAGES, encoders)
    made = ptq.Context(model, recipe, towers, encoders, data, ptq.states(recipe, towers), {})
    ptq.decide(made)
    return made


def inputs_of_the_first_block(made: ptq.Context, name: str = SITES[0]) -> torch.Tensor:
    """What a site reads, q, k and v if none is named, from the float model: `[images, tokens, K]`."""
    seen: list[torch.Tensor] = []
    with calibration.Hooks() as hooks, torch.no_grad():
        hooks.add(made.states[name].site.module, seen.append)
        made.model.encode_image(IMAGES)
    return seen[0]


@pytest.mark.parametrize("bits", [8, 4, None])
def test_the_strength_is_the_optimum_of_the_grid_when_it_is_computed_again(bits: int | None) -> None:
    """With every input, in plain torch, and inputs quantized as the recipe says."""
    made = decided(Treatment(3, bits or 16), rows=10**6, clip=False)
    chosen = []
    for kind in ("attn.out", "mlp.fc1", "mlp.fc2"):
        state = made.states[f"vision.blocks.0.{kind}"]
        x, weight = inputs_of_the_first_block(made, state.site.name), state.float_weight()
        size, losses = x.abs().mean((0, 1)), []
        for strength in STRENGTHS:
            s = size**strength
            s = s / (s.max() * s.min()).sqrt()
            used = x / s if bits is None else quantize_dequantize(x / s, bits)
            rounded = weights.quantize_weight(weight * s, state.plan.grid).dequantize()
            losses.append(float((used @ rounded.T - x @ weight.T).square().sum()))
        found = made.notes["awq_strength"][state.site.shared]
        assert min(losses) >= losses[STRENGTHS.index(found)] * (1 - 1e-5)  # r = 0 is rounding to nearest
        chosen.append(found)
        if found:
            (scale,) = state.transforms
            want = size**found
            assert isinstance(scale, Scale) and torch.allclose(
                1 / scale.factor, want / (want.max() * want.min()).sqrt()
            )
    assert any(chosen)
    q, k, v = (made.states[name].transforms for name in SITES)
    assert [*map(id, q)] == [*map(id, k)] == [*map(id, v)]


def test_the_scale_is_balanced_bounded_and_1_where_nothing_is_known() -> None:
    size = torch.tensor([0.0, 1e-9, 0.5, 2.0, 0.0])
    scale = channel_scale(size, 0.5)
    assert scale[0] == scale[4] == 1
    assert torch.allclose(scale[1:4], torch.tensor([1e-4, 0.5**0.5, 2**0.5]) / (1e-4 * 2**0.5) ** 0.5)
    assert torch.equal(channel_scale(size, 0.0)[1:4], torch.ones(3))
    assert torch.equal(channel_scale(torch.zeros(3), 0.5), torch.ones(3))


@pytest.mark.parametrize(
    "treatment", [Treatment(3, 8), Treatment(4, 8, 32), Treatment(2, 8, 64, weight_grid="asym")], ids=str
)
def test_a_clipped_group_never_errs_more(treatment: Treatment) -> None:
    """Group by group, in its partial products with the inputs; queries and keys are as they were."""
    made = decided(treatment, strength=0, rows=10**6)
    x = quantize_dequantize(inputs_of_the_first_block(made).flatten(0, 1), 8)
    clipped = 0
    for name in SITES:
        state = made.states[name]
        weight, grid = state.float_weight(), state.plan.grid
        if name != SITES[2]:
            assert state.weight is None
            continue
        nearest, got = weights.quantize_weight(weight, grid).dequantize(), state.weight.dequantize()
        for at in range(0, weight.shape[1], grid.group or weight.shape[1]):
            part = slice(at, at + (grid.group or weight.shape[1]))
            errors = [((weight - w)[:, part] @ x[:, part].T).square().sum(1) for w in (got, nearest)]
            assert (errors[0] <= errors[1] * (1 + 1e-4)).all()
            clipped += int((errors[0] < 0.99 * errors[1]).sum())
    assert clipped > 10


def test_float_outputs_do_not_change_by_its_scales() -> None:
    made = decided(Treatment(8, 16), strength=0.7, clip=False)
    for name, state in made.states.items():
        if state.transforms:
            weight, _ = state.folded()
            x = torch.randn(5, weight.shape[1])
            want = x @ state.float_weight().T
            assert torch.allclose(state.input(x) @ weight.T, want, atol=1e-5 * float(want.abs().max()) + 1e-5), name
    assert sum(bool(state.transforms) for state in made.states.values()) >= 12


def errors(made: ptq.Context, rounds: bool) -> dict[str, float]:
    """Squared errors on all images, in plain torch: of the sites of the first block, q, k and v together; of what was
    found, or of rounding to nearest."""
    sites = {s.site.kind: s for name, s in made.states.items() if "blocks.0" in name}

    def product(kind: str, x: torch.Tensor, floats: bool) -> torch.Tensor:
        state, bits = sites[kind], sites[kind].plan.activation_bits
        weight, bias = state.float_weight(), state.float_bias()
        if floats:
            return x @ weight.T + bias
        if rounds:
            return quantize_dequantize(x, bits) @ weights.quantize_weight(weight, state.plan.grid).dequantize().T + bias
        best = ptq.base.quantize_weight(state.folded()[0], state.plan) if state.weight is None else state.weight
        return quantize_dequantize(state.input(x), bits) @ best.dequantize().T + bias

    found: dict[str, float] = {}
    for kind in ("q", "k", "v", "out", "fc1", "fc2"):
        x = inputs_of_the_first_block(made, sites[kind].site.name)
        off = float((product(kind, x, False) - product(kind, x, True)).square().sum())
        key = "qkv" if kind in ("q", "k", "v") else kind
        found[key] = found.get(key, 0.0) + off
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("treatment", [Treatment(4, 8, 32), Treatment(4, 4, 64)], ids=str)
def test_what_is_chosen_never_errs_more_than_rounding_to_nearest(treatment: Treatment, seed: int) -> None:
    made = decided(treatment, seed=seed, rows=10**6)
    found, nearest = errors(made, rounds=False), errors(made, rounds=True)
    assert all(found[at] <= nearest[at] * (1 + 1e-4) for at in found), (found, nearest)
    assert sum(found[at] < 0.95 * nearest[at] for at in found) >= 3, (found, nearest)


def test_a_clip_that_makes_all_of_a_site_err_more_is_not_kept() -> None:
    """Rounded to nearest, the errors of two groups make each other good; clipping either for itself spoils that."""
    made = decided(Treatment(2, 8, 32), strength=0, clip=False)
    state = made.states[SITES[2]]
    half = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    x = quantize_dequantize(torch.cat([half, half], 1), 8)
    nearest = ptq.base.quantize_weight(state.float_weight(), state.plan)
    assert awq._rounded(state, x, x @ nearest.dequantize().T, clip=True) == (0.0, None)
    wanted = x @ state.float_weight().T
    error, weight = awq._rounded(state, x, wanted, clip=True)
    assert weight is not None and error < awq._error(nearest, x, wanted)


def test_no_scale_and_no_clip_is_rounding_to_nearest() -> None:
    made = decided(Treatment(4, 8, 32), strength=0, clip=False)
    assert not any(state.transforms or state.weight is not None for state in made.states.values())


@pytest.mark.parametrize("bits", ["w3a8", "w4a8"])
def test_images_that_it_has_not_seen_are_nearer_to_float(bits: str) -> None:
    draw = torch.Generator().manual_seed(3)
    seen, others = torch.randn(2, 48, 3, 32, 32, generator=draw)
    model, errors = with_loud_channels(small_clip()), {}
    with torch.no_grad():
        want = model.encode_image(others)
        for recipe in (bits, f"{bits}-awq"):
            plan = dataclasses.replace(recipes.get(recipe), towers=("vision",))
            got = qclip.quantize(model, plan, seen).encode_image(others)
            errors[recipe] = float(1 - nn.functional.cosine_similarity(got, want).mean())
    assert errors[f"{bits}-awq"] < 0.95 * errors[bits]


@pytest.mark.parametrize(
    "treatment",
    [
        Treatment(4, 8, 64, weight_grid="asym"),
        Treatment(3, 8),
        Treatment(8, 8, static=True),
    ],
    ids=str,
)
def test_kernels_give_what_the_simulated_model_gives(treatment: Treatment, tmp_path) -> None:
    recipe = Recipe("mine", treatment, steps=(step("awq", rows=64),), towers=("vision",))
    small = qclip.quantize(with_loud_channels(small_clip()), recipe, IMAGES)
    coverage = qclip.coverage(small)
    assert coverage.share("simulated") == 0 < coverage.share("real")
    for site in models.towers(small)["vision"]:
        if site.kind in ("embedding", "patch"):
            continue
        layer, bits = site.module, None if treatment.activation_bits == 16 else 8
        simulated = SimulatedLinear(
            layer.quantized.canonical(),
            layer.bias,
            layer.transforms,
            layer.input_scale,
            activation_bits=bits,
            grid=layer.grid,
        )
        x = torch.randn(7, layer.shape[1])
        want = simulated(x)
        assert (layer(x) - want).norm() < 1e-5 * want.norm()
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    assert torch.equal(again.encode_image(IMAGES), small.encode_image(IMAGES))


def test_it_leaves_the_codes_to_a_later_step_that_finds_them() -> None:
    assert recipes.get("w4a8-awq").decides("awq") == {"input", "weight"}
    assert recipes.get("w4a8-awq+gptq").decides("awq") == recipes.get("w4a8-awq+smoothquant+hqq").decides("awq")
    assert recipes.get("w4a8-awq+gptq").decides("awq") == {"input"} and recipes.get("w4a8-smoothquant+awq").needs_data
    with pytest.raises(RecipeError, match="'awq' changes inputs for which 'gptq' has"):
        Recipe("x", Treatment(4, 8), steps=(step("gptq"), step("awq", clip=False)))
    with pytest.raises(RecipeError, match="'smoothquant' changes inputs for which 'awq' has found codes"):
        recipes.get("w4a8-awq+smoothquant")
    both = Recipe("x", Treatment(4, 8, 32), steps=(step("awq"), step("gptq")), towers=("vision",))
    alone = dataclasses.replace(both, steps=(step("awq", clip=False),))
    images, layers = torch.randn(70, 3, 32, 32, generator=torch.Generator().manual_seed(3)), []
    for recipe in (both, alone):
        small = qclip.quantize(with_loud_channels(small_clip()), recipe, images)
        layers.append(models.towers(small)["vision"].sites["vision.blocks.0.mlp.fc1"].module)
    (scale,), (other,) = layers[0].transforms, layers[1].transforms
    assert scale.same(other) and not torch.equal(layers[0].dequantized_weight(), layers[1].dequantized_weight())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"strength": 1}, "strength must be 0 or more and below 1"),
        ({"strength": -0.1}, "strength must be 0 or more and below 1"),
        ({"rows": 0}, "rows must be 1 or more"),
        ({"samples": 0}, "samples must be 1 or more"),
        ({"clip": "no"}, "'clip' has the wrong type"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, word: str) -> None:
    with pytest.raises(RecipeError, match=f"'awq': .*{word}"):
        step("awq", **options)


def test_channels_that_were_never_seen_and_constant_inputs_stay_usable() -> None:
    model = small_clip()
    with torch.no_grad():
        for norm in (model.visual.transformer.resblocks[0].ln_1, model.visual.transformer.resblocks[1].ln_2):
            norm.weight.fill_(0.0)
            norm.bias[:20] = 0.0  # these are never seen; the others are the same in every row
    small = qclip.quantize(model, "w4a8-awq", IMAGES)
    for layer in (site.module for site in models.towers(small)["vision"] if site.kind == "fc1"):
        assert layer.dequantized_weight().isfinite().all()
    got, want = embed(small)[0], embed(model)[0]
    assert nn.functional.cosine_similarity(got, want).min() > 0.9


def test_inputs_that_are_not_finite_name_the_site() -> None:
    huge = small_clip()
    with torch.no_grad():
        huge.visual.transformer.resblocks[1].ln_1.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match="vision.blocks.1.attn.q: "):
        qclip.quantize(huge, "w4a8-awq", IMAGES)


def test_its_options_are_in_the_recipe() -> None:
    recipe = Recipe.from_dict({"name": "x", "weight_bits": 4, "group": 64, "steps": [{"method": "awq", "clip": False}]})
    assert Recipe.from_json(recipe.to_json()) == recipe and recipe.needs_data
    assert recipe.hash != dataclasses.replace(recipe, steps=(step("awq"),)).hash
    assert awq.RANGES[0] == 1 and len(awq.RANGES) == 10 and len(STRENGTHS) == 20
