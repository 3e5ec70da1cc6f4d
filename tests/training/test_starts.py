"""Where the papers start scales: by their formulas, of weights and of what calibration shows, and only where asked."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import qclip
from qclip.errors import RecipeError
from qclip.recipes import Recipe, Treatment
from qclip.training import prepare
from qclip.training.preparation import trained_sites
from qclip.training.quantizers import starts
from tests.small import IMAGES, small_clip
from tests.training.world import SETTINGS, pairs


def recipe(name: str, start: str = "paper") -> Recipe:
    found = qclip.recipes.get(name)
    return dataclasses.replace(found, trained=qclip.recipes.trained_by(found.trained[0], scale_start=start))


def normal(n: int = 200_000) -> Tensor:
    return torch.randn(1, n, generator=torch.Generator().manual_seed(0)) * 0.02


#: Of weights from N(0, sd): the scale in units of sd at 4 bits `symfull`, by hand.
WEIGHTS = {
    "lsq": 2 * math.sqrt(2 / math.pi) / math.sqrt(7),
    "lsq-plus": 3 / 8,
    "pact": 2 * math.sqrt(2 / math.pi) / math.sqrt(7),
    "ewgs": 6 / 15,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_a_normal_distribution(name: str) -> None:
    kind = qclip.recipes.QUANTIZERS.get(name)
    weight, plan = normal(), Treatment(4, 8, weight_observer="mse", weight_grid="symfull")
    rounding = kind(kind.options(scale_start="paper")).weight(weight, plan)
    rounding.start(weight)
    assert float(rounding.learned().detach()) == pytest.approx(0.02 * WEIGHTS[name], rel=0.01)
    usual = kind(kind.options()).weight(weight, plan)
    usual.start(weight)
    assert float(usual.learned().detach()) == pytest.approx(0.02 * 0.335, rel=0.03)  # of least squared error


def test_each_group_has_its_own_and_a_whole_weight_one() -> None:
    weight = normal(640).reshape(5, 128) * torch.tensor([1.0, 2, 3, 4, 5])[:, None]
    kind = qclip.recipes.QUANTIZERS.get("lsq")
    made = kind(kind.options(scale_start="paper"))
    groups = made.weight(weight, Treatment(4, 8, group=64, weight_grid="symfull"))
    groups.start(weight)
    wanted = 2 * weight.reshape(5, 2, 64).abs().mean(-1) / math.sqrt(7)
    torch.testing.assert_close(groups.learned().detach(), wanted)
    whole = made.weight(weight, Treatment(8, 8, weight_scale="tensor"))
    whole.start(weight)
    torch.testing.assert_close(whole.learned().detach(), 2 * weight.abs().mean().reshape(1, 1) / math.sqrt(127))


def test_eight_bits_are_far_off() -> None:
    """What docs/methods.md says of LSQ's start: 19 times the squared error of the best scale."""
    weight, errors = normal().reshape(250, 800), {}
    kind = qclip.recipes.QUANTIZERS.get("lsq")
    for start in ("mse", "paper"):
        rounding = kind(kind.options(scale_start=start)).weight(weight, Treatment(8, 8, weight_observer="mse"))
        rounding.start(weight)
        errors[start] = float((rounding(weight) - weight).square().mean().detach())
    assert 15 < errors["paper"] / errors["mse"] < 40


#: Of the inputs x of a layer: the scale, of their moments, Qp and the number of codes.
INPUTS = {
    "lsq": lambda x, high: 2 * x.abs().mean() / math.sqrt(high),
    "ofq": lambda x, high: 4 * x.abs().mean() / math.sqrt(high),
    "ewgs": lambda x, high: 3 * x.std(correction=0) / math.sqrt(1 - 2 / math.pi) / high,
    "pact": lambda x, high: torch.tensor(10.0 / high),
    "dorefa": lambda x, high: torch.tensor(1.0 / high),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bits", ["w4a8", "w4a4"])
def test_inputs_are_those_that_calibration_shows(name: str, bits: str) -> None:
    model = small_clip()
    student = prepare(model, recipe(f"{bits}-{name}"), IMAGES)
    site, module = next((s, m) for s, m in trained_sites(student) if s.name == "vision.blocks.1.mlp.fc2")
    seen: list[Tensor] = []
    float_site = next(s for s in qclip.models.towers(model)["vision"] if s.name == site.name)
    handle = float_site.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.encode_image(IMAGES)
    handle.remove()
    rounding = module.input_rounding
    wanted = INPUTS[name](seen[0], rounding.high - float(rounding.zero))
    assert float(rounding.learned().detach()) == pytest.approx(float(wanted), rel=1e-4)
    assert torch.equal(rounding.learned.log.detach(), rounding.learned.origin)
    usual = dict((s.name, m) for s, m in trained_sites(prepare(model, recipe(f"{bits}-{name}", "mse"), IMAGES)))
    assert float(usual[site.name].input_rounding.learned().detach()) != pytest.approx(float(wanted), rel=1e-3)


def test_a_run_that_rounds_late_starts_there_too_and_goes_on() -> None:
    trained = qclip.train(small_clip(), recipe("w4a4-lsq"), pairs(), **SETTINGS | {"start": 0.5, "steps": 4})
    assert trained.qclip_quantization.recipe.trained[1].scale_start == "paper"


def test_where_there_is_none() -> None:
    with pytest.raises(RecipeError, match="scale_start"):
        recipe("w4a8-lsq-authors")
    with pytest.raises(RecipeError, match="'mse' or 'paper'"):
        recipe("w4a8-lsq", "papers")
    variation = qclip.recipes.QUANTIZERS.get("variation")
    assert variation.paper == starts.Paper()
    assert starts.Options().scale_start == "mse"
