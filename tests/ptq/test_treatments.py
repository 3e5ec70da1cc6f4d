"""Treatments: static ranges by each observer, zero points, one scale for a weight; on kernels, simulated, and saved."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import qclip
from qclip import models, ptq, recipes, rewrite
from qclip.errors import ArtifactError, NonFiniteError, RecipeError
from qclip.layers import Int4Linear, Int8Linear, SimulatedLinear
from qclip.ptq.base import quantize_weight
from qclip.recipes import FLOAT, Recipe, Treatment
from qkernels.grids import PERCENTILES, Grid
from tests.small import IMAGES, small_clip

HASHES = {  # of recipes as they were before these fields
    "w8a8": "bbefb8d9c7fd",
    "w8a8-static": "a849e87dc460",
    "w4a8": "6bfa74cad20b",
    "w4a8-mixed": "34dc71b32b03",
    "w8a8-smoothquant": "be3b4f5c215a",
}


def embed(model):
    with torch.no_grad():
        return model.encode_image(IMAGES)


def linears(model):
    return [m for m in model.modules() if isinstance(m, Int8Linear | Int4Linear | SimulatedLinear)]


# -- as data ---------------------------------------------------------------------------------------------------------


def test_recipes_of_before_keep_their_hashes():
    assert {name: recipes.get(name).hash for name in HASHES} == HASHES
    assert "activation_grid" not in recipes.get("w8a8-static").to_json()


def test_new_fields_are_written_where_they_differ_and_are_part_of_the_hash():
    treatment = Treatment(
        8, static=True, activation_grid="asym", activation_observer="percentile", weight_scale="tensor"
    )
    recipe = Recipe("x", exceptions=(("*.q", treatment),))
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe and again.hash == recipe.hash != Recipe("x").hash
    written = recipe.to_dict()["exceptions"]["*.q"]
    assert written["activation_grid"] == "asym" and "activation_percentile" not in written
    hashes = {Recipe("x", each).hash for each in (Treatment(), Treatment(weight_scale="tensor"), treatment)}
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"activation_grid": "asymm"}, "unknown activation_grid.*'asym'"),
        ({"static": True, "activation_observer": "percentil"}, "unknown activation_observer.*'percentile'"),
        ({"weight_scale": "token"}, "unknown weight_scale"),
        ({"activation_observer": "min-max"}, "finds static ranges; set 'static', or drop it"),
        ({"activation_percentile": 99.0}, "is for activation_observer 'percentile'"),
        (
            {"static": True, "activation_observer": "percentile", "activation_percentile": 20.0},
            "above 50 and not above 100, not at 20",
        ),
        ({"activation_bits": FLOAT, "activation_grid": "asym"}, "float activations .* have no grid"),
        ({"weight_bits": 4, "group": 64, "weight_scale": "tensor"}, "leaves no groups; drop 'group'"),
    ],
)
def test_fields_that_contradict_are_refused(fields, word):
    with pytest.raises(RecipeError, match=word):
        Treatment(**fields)


# -- zero points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", recipes.ACTIVATION_OBSERVERS)
@pytest.mark.parametrize("treatment", [Treatment(8, 8), Treatment(4, 8, 32)], ids=["w8", "w4"])
def test_static_zero_points_run_on_kernels_and_come_back(treatment, observer, tmp_path):
    fields = treatment.to_dict() | {"static": True, "activation_grid": "asym", "activation_observer": observer}
    model, recipe = small_clip(), Recipe("x", Treatment(**fields))
    small = qclip.quantize(model, recipe, IMAGES)
    assert qclip.coverage(small).share("simulated") == 0
    block = models.towers(small)["vision"].blocks[0]
    assert all(site.module.input_zero is not None for site in block.sites.values())
    fc2 = block.sites["fc2"].module  # behind GELU: nearly all of the range lies above 0
    assert int(fc2.input_zero) < -50 and getattr(*block.attention).shares_input
    # What the kernels give is what the same states give in float arithmetic.
    simulated = copy.deepcopy(small)
    for site in (site for tower in models.towers(simulated).values() for site in tower):
        layer = site.module
        if isinstance(layer, Int8Linear | Int4Linear):
            weight, rest = layer.quantized.canonical(), {"grid": layer.grid, "activation_bits": 8}
            constants = (layer.bias, layer.transforms, layer.input_scale, layer.input_zero)
            setattr(site.owner, site.attribute, SimulatedLinear(weight, *constants, **rest))
    got, want = embed(small), embed(simulated)
    assert qclip.coverage(simulated).share("simulated") > 0.5
    assert (got - want).norm() < 2e-3 * want.norm()  # codes near ties
    assert nn.functional.cosine_similarity(got, embed(model)).min() > (0.999 if treatment.weight_bits == 8 else 0.97)
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    assert torch.equal(embed(again), got)


def test_zero_points_pay_where_inputs_lie_to_one_side():
    """GELU's output: with a zero point the codes below 0 are not left empty."""
    torch.manual_seed(0)
    x = nn.functional.gelu(3 * torch.randn(400, 64))
    source, site = nn.Linear(64, 32), models.Site("vision.x", "fc2", "activation", "vision.x.in", nn.Module())
    wrong = {}
    for grid in ("sym", "asym"):
        plan = Treatment(8, 8, static=True, activation_grid=grid)
        state = ptq.SiteState(site, source, plan)
        state.input_scale, state.input_zero = qclip.calibration.static_input([x], plan)
        layer = ptq.build(state)
        rewrite.pack(layer)
        with torch.no_grad():
            exact = x @ layer.dequantized_weight().T + source.bias
            wrong[grid] = (layer(x) - exact).square().mean()
    assert wrong["asym"] < 0.35 * wrong["sym"]  # half the step is a quarter of the error


def test_zero_points_per_token_are_simulated_and_come_back(tmp_path):
    model = small_clip()
    for bits in (8, 4):
        small = qclip.quantize(model, Recipe("x", Treatment(8, bits, activation_grid="asym")))
        rows = {row.site: row for row in qclip.coverage(small).rows}
        assert rows["vision.blocks.0.mlp.fc2"].state == "simulated"
        plain = qclip.quantize(model, Recipe("x", Treatment(8, bits)))
        far, plainly = (1 - nn.functional.cosine_similarity(embed(m), embed(model)).mean() for m in (small, plain))
        assert far < plainly
        again = qclip.load(qclip.save(small, tmp_path / str(bits)))
        assert torch.equal(embed(again), embed(small))
        assert {getattr(m, "activation_grid", "") for m in linears(again)} >= {"asym"}


def test_plans_and_layers_of_a_file_agree_about_zero_points(tmp_path):
    small = qclip.quantize(small_clip(), Recipe("x", Treatment(static=True, activation_grid="asym")), IMAGES)
    from qclip import description

    layer = models.towers(small)["vision"].blocks[0].sites["q"].module
    plan = Treatment(static=True, activation_grid="asym")
    description.check_layer("q", layer, plan)
    with pytest.raises(ArtifactError, match="a zero point of its input, and its plan is 'sym'"):
        description.check_layer("q", layer, Treatment(static=True))
    bare = qclip.quantize(small_clip(), "w8a8-static", IMAGES)
    with pytest.raises(ArtifactError, match="no zero point of its input, and its plan is 'asym'"):
        description.check_layer("q", models.towers(bare)["vision"].blocks[0].sites["q"].module, plan)


@pytest.mark.parametrize("observer", recipes.ACTIVATION_OBSERVERS)
def test_inputs_that_are_not_finite_are_told_by_name(observer):
    model = small_clip()
    with torch.no_grad():  # finite weights, but what fc2 reads is not
        model.visual.transformer.resblocks[1].mlp.c_fc.weight.mul_(1e38)
    recipe = Recipe(
        "x", Treatment(static=True, activation_grid="asym", activation_observer=observer), towers=("vision",)
    )
    with pytest.raises(NonFiniteError, match=r"vision\.blocks\.1\.mlp\.fc2 is NaN or Inf during calibration"):
        qclip.quantize(model, recipe, IMAGES)


# -- weights ---------------------------------------------------------------------------------------------------------


def test_sites_that_share_an_input_may_have_plans_of_their_own():
    four = Treatment(8, 4, static=True, activation_observer="min-max")
    recipe = Recipe("x", Treatment(static=True), exceptions=(("*.k", four),), towers=("vision",))
    sites = models.towers(qclip.quantize(small_clip(), recipe, IMAGES))["vision"].blocks[0].sites
    q, k, v = (float(sites[kind].module.input_scale) for kind in "qkv")
    assert q == v and k > 10 * q  # 7 codes instead of 127, and nothing clipped


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_one_scale_for_a_whole_weight(bits, tmp_path):
    plan = Treatment(bits, 8, weight_scale="tensor", weight_observer="mse")
    w = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 2, 24)[:, None]
    weight = quantize_weight(w, plan)
    assert len(weight.scales.unique()) == 1

    def error(weight):
        return float((weight.dequantize() - w).square().sum())

    flat = quantize_weight(w.view(1, -1), Treatment(bits, 8, weight_observer="mse"))  # as one channel
    assert torch.equal(weight.dequantize().flatten(), flat.dequantize().flatten())
    assert error(quantize_weight(w, Treatment(bits, 8, weight_observer="mse"))) < error(weight)
    small = qclip.quantize(small_clip(), Recipe("x", plan))
    again = qclip.load(qclip.save(small, tmp_path / "a"))
    assert torch.equal(embed(again), embed(small)) and qclip.coverage(small).share("simulated") == 0
    assert all(
        len(m.quantized.canonical().scales.unique()) == 1 for m in linears(small) if m.grid.bits == bits and bits < 8
    )


@pytest.mark.parametrize(("kind", "bits", "group"), [("sym", 8, None), ("symfull", 4, 64), ("asym", 4, None)])
def test_weights_clipped_at_the_best_of_three_percentiles(kind, bits, group):
    """By brute force with numpy's percentiles, the last group being short."""
    w = torch.randn(3, 600, generator=torch.Generator().manual_seed(0)) ** 3
    grid = Grid(bits, kind, group)
    scales, zeros = grid.fit(w, "percentile")
    starts = range(0, 600, group or 600)
    for row, (n, start) in enumerate((n, s) for n in range(3) for s in starts):
        values = w[n, start : start + (group or 600)]
        tried = []
        for percentile in PERCENTILES:
            if kind == "asym":
                low, high = np.percentile(values.numpy(), [100 - percentile, percentile])
            else:
                high = np.percentile(values.abs().numpy(), percentile)
                low = -high
            clipped = values.clamp(float(low), float(high))[None]
            scale, zero = Grid(bits, kind).fit(clipped)
            decoded = grid.decode(grid.encode(values[None], scale, zero), scale, zero)
            tried.append(
                (float((decoded - values).square().sum()), float(scale), None if zero is None else float(zero))
            )
        error, scale, zero = min(tried)
        found = scales.flatten()[row][None, None], None if zeros is None else zeros.flatten()[row][None, None]
        decoded = grid.decode(grid.encode(values[None], *found), *found)
        assert float((decoded - values).square().sum()) == pytest.approx(error, rel=1e-4)
    if kind == "sym":  # 600 values: the largest one is clipped
        assert (scales < grid.fit(w)[0]).all()
