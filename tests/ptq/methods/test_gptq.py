"""GPTQ in a model: what it sees, what it leaves, what it says. Its arithmetic: tests/ptq/test_compensation.py."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn

import qclip
from qclip import calibration, models, ptq, recipes
from qclip.errors import NonFiniteError, RecipeError
from qclip.layers import SimulatedLinear
from qclip.ptq.compensation import Factor, round_columns
from qclip.ptq.methods.gptq import GPTQ, Options
from qclip.recipes import Recipe, Treatment, step
from tests.small import IMAGES, TEXTS, small_clip

PHOTOGRAPHS = torch.randn(48, 3, 4, 4, generator=torch.Generator().manual_seed(3))
PHOTOGRAPHS = nn.functional.interpolate(PHOTOGRAPHS, (32, 32), mode="bilinear")  # smooth, so that tokens are alike
pytestmark = pytest.mark.filterwarnings("ignore:.*saw fewer inputs than channels")


def embed(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.encode_image(IMAGES), model.encode_text(model.tokenizer(TEXTS))


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float(1 - nn.functional.cosine_similarity(got, want).mean())


def image_error(recipe: str | Recipe, model: nn.Module) -> float:
    held_out = nn.functional.interpolate(torch.randn(32, 3, 4, 4), (32, 32), mode="bilinear")
    small = qclip.quantize(model, recipe, PHOTOGRAPHS)
    with torch.no_grad():
        return off(small.encode_image(held_out), model.encode_image(held_out))


@pytest.mark.parametrize("bits", ["w3a8", "w4a8", "w4a16"])
def test_embeddings_of_images_that_it_has_not_seen_are_nearer(bits: str) -> None:
    model = small_clip()
    assert image_error(f"{bits}-gptq", model) < 0.6 * image_error(bits, model)


@pytest.mark.parametrize(
    "treatment",
    [
        Treatment(4, 8, 64),
        Treatment(4, 8, 32, weight_grid="asym"),
        Treatment(3, 8),
        Treatment(2, 8, weight_grid="midrise"),
        Treatment(8, 8),
        Treatment(4, 16, 128),
    ],
    ids=str,
)
@pytest.mark.parametrize("act_order", [True, False])
def test_kernels_give_what_the_simulated_model_gives(treatment: Treatment, act_order: bool, tmp_path) -> None:
    recipe = Recipe("mine", treatment, steps=(step("gptq", act_order=act_order),))
    small = qclip.quantize(small_clip(), recipe, IMAGES)
    coverage = qclip.coverage(small)
    assert coverage.share("simulated") == 0 and coverage.share("real") > 0.8
    for tower in models.towers(small).values():
        for site in tower:
            layer = getattr(site.module, "site", site.module)
            if site.kind in ("embedding", "patch"):
                continue
            bits = None if treatment.activation_bits == 16 else 8
            simulated = SimulatedLinear(
                layer.quantized.canonical(), layer.bias, layer.transforms, activation_bits=bits, grid=layer.grid
            )
            x = torch.randn(7, layer.shape[1])
            want = simulated(x)
            assert (layer(x) - want).norm() < 1e-5 * want.norm()
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    assert all(torch.equal(a, b) for a, b in zip(embed(again), embed(small), strict=True))


def context(model: nn.Module, recipe: str | Recipe, images: torch.Tensor = IMAGES) -> ptq.Context:
    recipe, towers, encoders = recipes.get(recipe), models.towers(model), models.encoders(model)
    data = calibration.samples(images, encoders)
    return ptq.Context(model, recipe, towers, encoders, data, ptq.states(recipe, towers), {})


def test_it_sees_inputs_behind_quantized_sites_transforms_and_quantizers() -> None:
    """The codes of fc2 are those of the Hessian of what fc2 multiplies in the quantized block."""
    mine = small_clip()
    made = context(mine, Recipe("x", Treatment(3, 4), steps=(step("gptq", observer=None),)))
    ptq.decide(made)
    found = made.states["vision.blocks.0.mlp.fc2"]
    small = qclip.quantize(
        small_clip(),
        Recipe(
            "x",
            Treatment(3, 4),
            (("vision.blocks.0.mlp.fc2", "float"), ("vision.blocks.1.*", "float")),
            (step("gptq", observer=None),),
        ),
        IMAGES,
    )
    seen: list[torch.Tensor] = []
    fc2 = models.towers(small)["vision"].sites["vision.blocks.0.mlp.fc2"].module
    handle = fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        small.encode_image(IMAGES)
    handle.remove()
    x = qclip.layers.activations.quantize_dequantize(torch.cat(seen).flatten(0, -2), 4)
    factor = Factor.of(2 / len(x) * x.T @ x, sort=True)
    want = round_columns(found.folded()[0], factor, found.plan.grid).weight
    same = (want.codes == found.weight.canonical().codes).float().mean()
    assert same > 0.99  # the sums of H may differ in last digits


def test_q_k_and_v_share_one_factor(monkeypatch) -> None:
    calls = []
    of = Factor.of
    monkeypatch.setattr(Factor, "of", staticmethod(lambda *args: calls.append(1) or of(*args)))
    ptq.decide(context(small_clip(), "w4a8-gptq"))
    assert len(calls) == 2 * (2 * 4 + 1)  # towers, blocks, inputs; a projection each


def test_what_is_lost_on_average_is_in_the_bias() -> None:
    """A site alone is quantized: the mean of its output is that of the float site."""
    means = {}
    for bias in (True, False):
        mine = small_clip()
        recipe = Recipe("x", Treatment(2, 16), (("*", "float"), ("vision.blocks.1.mlp.fc1", "w2a16")))
        recipe = dataclasses.replace(recipe, steps=(step("gptq", bias=bias),))
        made = context(mine, recipe)
        seen: list[torch.Tensor] = []
        site = made.towers["vision"].sites["vision.blocks.1.mlp.fc1"]
        handle = site.module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            mine.encode_image(IMAGES)
            handle.remove()
            ptq.decide(made)
            x = seen[0][:, :1].flatten(0, 1)  # the rows that are read are nine tenths of the moments
            x = 0.9 * x.mean(0) + 0.1 * seen[0].flatten(0, 1).mean(0)
            state = made.states[site.name]
            lost = site.module(x) - (x @ state.weight.dequantize().T + state.float_bias())
        means[bias] = float((lost.norm() / site.module(x).norm()).detach())
    assert means[True] < 1e-5 < 1e-2 < means[False]


def test_it_follows_transforms() -> None:
    made = context(small_clip(), "w4a8-smoothquant+gptq")
    ptq.decide(made)
    state = made.states["vision.blocks.0.mlp.fc1"]
    assert state.transforms and state.weight is not None
    near = state.weight.dequantize() - state.folded()[0]
    assert near.norm() < 0.2 * state.folded()[0].norm()
    with pytest.raises(RecipeError, match="put 'smoothquant' before 'gptq'"):
        recipes.get("w4a8-gptq+smoothquant")


def test_a_hessian_that_fails_is_damped_and_that_is_said() -> None:
    made = context(
        small_clip(), Recipe("x", Treatment(4, 16, 128), steps=(step("gptq", damp=0),)), IMAGES[:1].repeat(3, 1, 1, 1)
    )
    with pytest.warns(UserWarning, match="GPTQ.*damp"):
        ptq.decide(made)
    assert made.notes["gptq"]["vision.features"]["damp"] > 0


def test_one_image_again_and_again_is_marked() -> None:
    with pytest.warns(UserWarning, match="GPTQ saw fewer inputs than channels at .*vision.features .* for 64"):
        qclip.quantize(small_clip(), "w4a8-gptq", IMAGES[:1].repeat(20, 1, 1, 1))


def test_what_is_enough_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = dataclasses.replace(recipes.get("w4a8-gptq"), towers=("vision",))
        qclip.quantize(small_clip(), recipe, torch.randn(70, 3, 32, 32))


def test_channels_that_were_never_seen_are_counted() -> None:
    model = small_clip()
    with torch.no_grad():
        norm = model.visual.transformer.resblocks[0].ln_2
        norm.weight[[3, 7]], norm.bias[[3, 7]] = 0.0, 0.0
    small = qclip.quantize(model, "w4a8-gptq", IMAGES)
    notes = small.qclip_quantization.provenance["gptq"]
    assert notes["vision.blocks.0.mlp.in"]["channels_never_seen"] == 2
    assert "channels_never_seen" not in notes["vision.blocks.1.mlp.in"]
    assert off(embed(small)[0], embed(model)[0]) < 0.05


def test_inputs_that_are_not_finite_name_the_site() -> None:
    huge = copy.deepcopy(small_clip())
    with torch.no_grad():
        huge.visual.transformer.resblocks[1].ln_1.weight.fill_(3e38)
    with pytest.raises(NonFiniteError, match="vision.blocks.1.attn.q: its inputs are NaN or infinite"):
        qclip.quantize(huge, "w4a8-gptq", IMAGES)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"damp": -0.1}, "damp must lie between 0 and 1"),
        ({"damp": 2}, "damp must lie between 0 and 1"),
        ({"block": 0}, "block must be 1 or more"),
        ({"samples": 0}, "samples must be 1 or more"),
        ({"observer": "msr"}, "'observer' has the wrong type"),
        ({"actorder": True}, "unknown field 'actorder'.*'act_order'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, word: str) -> None:
    with pytest.raises(RecipeError, match=f"'gptq': .*{word}"):
        step("gptq", **options)


def test_its_options_are_in_the_recipe() -> None:
    recipe = Recipe.from_dict({"name": "x", "weight_bits": 3, "steps": [{"method": "gptq", "damp": 0.1}]})
    assert recipe.steps[0][1] == Options(damp=0.1) and Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.needs_data and GPTQ(Options(samples=7)).samples == 7


def test_two_observers_are_a_contradiction() -> None:
    plan = Treatment(4, 8, 128, weight_observer="percentile")
    with pytest.raises(RecipeError, match="to be found by 'percentile' and gptq's by 'mse'; leave out weight_observer"):
        qclip.quantize(small_clip(), Recipe("x", plan, steps=(step("gptq"),)), IMAGES)
    vision = {"towers": ("vision",)}
    for options, wanted in (({"observer": None}, "percentile"), ({"observer": "min-max"}, "min-max")):
        given = plan if options["observer"] is None else Treatment(4, 8, 128)
        small = qclip.quantize(small_clip(), Recipe("x", given, steps=(step("gptq", **options),), **vision), IMAGES)
        plans = small.qclip_quantization.plans
        assert plans["vision.blocks.0.mlp.fc1"].weight_observer == wanted
    # What an earlier step has made of the plan is none of the recipe's.
    qclip.quantize(small_clip(), dataclasses.replace(recipes.get("w8a8-repq-vit+gptq"), **vision), IMAGES)


def test_means_are_of_what_the_float_site_sees_and_of_what_the_codes_multiply() -> None:
    """With inputs of few bits they differ: bias correction takes both."""
    made = context(
        small_clip(),
        Recipe("x", Treatment(8, 2), (("*", "float"), ("vision.blocks.1.mlp.fc1", "w8a2")), (step("gptq", bias=True),)),
    )
    site = made.towers["vision"].sites["vision.blocks.1.mlp.fc1"]
    seen: list[torch.Tensor] = []
    handle = site.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        made.model.encode_image(IMAGES)
        handle.remove()
        ptq.decide(made)
        state = made.states[site.name]

        def mean(x: torch.Tensor) -> torch.Tensor:
            return 0.9 * x[:, :1].flatten(0, 1).mean(0) + 0.1 * x.flatten(0, 1).mean(0)

        codes = qclip.layers.activations.quantize_dequantize(seen[0], 2)
        want = site.module(mean(seen[0]))
        got = mean(codes) @ state.weight.dequantize().T + state.bias
    assert (mean(codes) - mean(seen[0])).norm() > 0.05 * mean(seen[0]).norm()
    assert (got - want).norm() < 1e-4 * want.norm()
