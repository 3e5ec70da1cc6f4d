"""Sites quantized alone against the same by recipe; budgets against exhaustive search and what is written to disk."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qclip
from qclip import Recipe, Results, data, sensitivities
from qclip.cli import main
from qclip.data import ImageSet
from qclip.errors import InputError, RecipeError
from qclip.recipes import Treatment
from qclip.sensitivities import Budget, budget, groups
from tests.small import small_clip

BITS = (2, 4, 8)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return data.load("scenes:test?samples=24")


@pytest.fixture(scope="module")
def found(model: nn.Module, images: ImageSet) -> Results:
    return qclip.sensitivity(model, images, BITS, count=24, cache=False)


def one(found: Results, metric: str, name: str, at: int) -> dict:
    (row,) = found.where(metric=metric, set=name, at=at).rows
    return row


def only(sites: list[str], bits: int) -> Recipe:
    """A recipe that quantizes these sites alone."""
    written = {"name": "alone", "weight_bits": bits, "exceptions": {"*": "float"} | dict.fromkeys(sites, f"w{bits}a8")}
    return Recipe.from_dict(written)


def test_a_site_alone_is_what_a_recipe_of_that_site_does(model: nn.Module, images: ImageSet, found: Results) -> None:
    name = "vision.blocks.1.mlp.fc1"
    small = qclip.quantize(model, only([name], 2))
    results = qclip.evaluate(
        {"float": model, "small": small}, images, corruptions=(), cache=False, templates=images.prompts[:2]
    )
    row = one(found, "sensitivity", name, 2)
    cosine, kl = (results.value(model="small", metric=m, reference="float") for m in ("cosine_mean", "kl"))
    assert row["value"] == pytest.approx(1 - cosine, rel=1e-3) and row["value"] > 1e-5
    assert row["low"] < row["value"] < row["high"] and row["n"] == 24
    same = one(found, "sensitivity_kl", name, 2)
    assert same["value"] == pytest.approx(kl, rel=1e-2)
    top1 = one(found, "sensitivity_top1", name, 2)
    assert top1["value"] == pytest.approx(
        results.value(model="small", metric="top1", reference="float", set=images.name)
    )
    ece = one(found, "sensitivity_ece", name, 2)
    assert ece["value"] == pytest.approx(results.value(model="small", metric="ece", reference="float"), abs=1e-6)


def test_q_k_and_v_are_quantized_together_and_a_tower_whole(model: nn.Module, found: Results) -> None:
    rows = found.where(metric="sensitivity", role="site", at=2).rows
    together = [row["value"] for row in rows if row["subset"] == "vision.blocks.0.attn.in"]
    assert len(together) == 3 and len(set(together)) == 1
    towers = {row["set"]: row["value"] for row in found.where(metric="sensitivity", role="tower", at=2).rows}
    assert set(towers) == {"vision", "text"}
    for name, whole in towers.items():
        assert whole > max(row["value"] for row in rows if row["set"].startswith(name))


def test_the_model_stays_as_it_is(model: nn.Module, images: ImageSet) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qclip.sensitivity(model, images, (2,), count=8, cache=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(before) == list(model.state_dict())


def test_what_was_measured_is_kept(
    model: nn.Module, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = qclip.sensitivity(model, images, (2, 8), count=8, cache=tmp_path)
    monkeypatch.setattr("qclip.sensitivities.probe.Probe.outcome", lambda *_: pytest.fail("measured again"))
    assert qclip.sensitivity(model, images, (2, 8), count=8, cache=tmp_path).rows == once.rows
    entry = next(tmp_path.rglob("*.safetensors"))
    entry.write_bytes(entry.read_bytes()[:-5])
    with pytest.raises(BaseException, match="measured again"), pytest.warns(UserWarning, match="computed again"):
        qclip.sensitivity(model, images, (2, 8), count=8, cache=tmp_path)


def test_bad_input(model: nn.Module, images: ImageSet) -> None:
    with pytest.raises(InputError, match="quantized already"):
        qclip.sensitivity(qclip.quantize(model, "w8a8"), images, cache=False)
    with pytest.raises(InputError, match="w9a8 cannot be measured"):
        qclip.sensitivity(model, images, (9,), cache=False)
    with pytest.raises(InputError, match="no width"):
        qclip.sensitivity(model, images, (), cache=False)


@pytest.mark.parametrize("text", ["", "4", "bit", "-1bit", "0MB", "4.5 bytes", "1e3MB", "nanbit", "4,5bit"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"such as 4\.5bit or 60MB"):
        Budget.parse(text)


def test_budgets_are_read() -> None:
    assert Budget.parse("4.5bit").bits == 4.5 and Budget.parse("3 bits").bits == 3
    assert [Budget.parse(text).bytes for text in ("60MB", "1.5kB", "2GiB")] == [60_000_000, 1500, 2 << 30]


def test_a_budget_in_bits_is_kept_and_used(model: nn.Module, found: Results) -> None:
    chosen = qclip.budgeted(model, "3.6bit", found)
    small = qclip.quantize(model, chosen)
    bits = weights = 0
    for site in (site for tower in qclip.towers(small).values() for site in tower):
        if site.kind not in groups.FIXED:
            weights += site.module.dequantized_weight().numel()
    with qclip.models.explicit_form(model) as towers:
        members = groups.groups(towers, chosen)
        for group in members:
            for site in group.sites:
                bits += groups.stored_bits(chosen.plan(site.name, site.kind).grid, *site.module.weight.flatten(1).shape)
        assert sum(group.weights for group in members) == weights
    assert 3.4 * weights < bits <= 3.6 * weights


def test_a_size_in_bytes_is_that_of_the_file(model: nn.Module, found: Results, tmp_path: Path) -> None:
    eight = qclip.quantize(model, "w8a8")
    qclip.save(eight, tmp_path / "eight")
    size = (tmp_path / "eight" / "model.safetensors").stat().st_size
    with pytest.raises(RecipeError) as caught:
        qclip.budgeted(model, "1kB", found)
    least = float(str(caught.value).split("can is ")[1].split("MB")[0])
    limit = (least * 1e6 + size) / 2
    chosen = qclip.budgeted(model, f"{limit / 1e6:.6f}MB", found)
    qclip.save(qclip.quantize(model, chosen), tmp_path / "less")
    content = (tmp_path / "less" / "model.safetensors").read_bytes()
    written = len(content) - 8 - int.from_bytes(content[:8], "little")  # without names and shapes
    assert least * 1e6 - 5000 < written <= limit


def test_widths_are_the_best_of_all(model: nn.Module, found: Results) -> None:
    """Of the first groups of a model, by trying every choice."""
    few = dataclasses.replace(
        Recipe("few", Treatment.named("w4a8")),
        exceptions=(
            ("*", None),
            *((f"vision.blocks.0.{each}", Treatment.named("w4a8")) for each in ("attn.*", "mlp.*")),
        ),
    )
    with qclip.models.explicit_form(model) as towers:
        members = groups.groups(towers, few)
        tables = [budget._choices(group, few, found) for group in members]
        weights = sum(group.weights for group in members)
    assert len(members) == 4
    for limit in (2.9, 4.4, 6.0):
        chosen = qclip.budgeted(model, f"{limit}bit", found, few)
        least = min(
            sum(choice.damage for _, choice in picked)
            for picked in itertools.product(*tables)
            if sum(choice.size for _, choice in picked) <= limit * weights
        )
        damage = 0.0
        for group, table in zip(members, tables, strict=True):
            plan = chosen.plan(group.sites[0].name, group.sites[0].kind)
            damage += next(choice.damage for treatment, choice in table if treatment == plan)
        assert damage == pytest.approx(least, rel=1e-12)


def test_a_budget_that_cannot_be_met_names_the_nearest(model: nn.Module, found: Results) -> None:
    with pytest.raises(RecipeError, match=r"cannot be met; the nearest that can is (\S+)bit") as caught:
        qclip.budgeted(model, "1bit", found)
    nearest = float(str(caught.value).split("can is ")[1].split("bit")[0])
    assert {plan.weight_bits for _, plan in qclip.budgeted(model, f"{nearest + 0.001}bit", found).exceptions} <= {2}
    with pytest.raises(RecipeError, match=r"the nearest that can is \S+MB"):
        qclip.budgeted(model, "1kB", found)


def test_sensitivities_of_another_model_or_width_are_refused(model: nn.Module, found: Results) -> None:
    with pytest.raises(InputError, match="tell nothing of"):
        qclip.budgeted(model, "4bit", Results())
    with pytest.raises(InputError, match="at 16 activation bits"):
        qclip.budgeted(model, "4bit", found, qclip.recipes.get("w4a16"))


def test_low_widths_are_measured_as_a_whole(model: nn.Module, images: ImageSet, found: Results) -> None:
    whole = sensitivities.together(sensitivities.probe_of(model, images, 24))
    with qclip.models.explicit_form(model) as towers:
        members = groups.groups(towers, qclip.recipes.get("w4a8"))

    def error(recipe: Recipe) -> float:
        return whole({g.name: recipe.plan(g.sites[0].name, g.sites[0].kind).weight_bits for g in members})

    plain, refined = (qclip.budgeted(model, "2.5bit", found, None, each) for each in (None, whole))
    assert error(refined) <= error(plain)
    assert error(plain) > 1e-3
    tower = one(found, "sensitivity", "vision", 2)["value"]
    assert whole({g.name: 2 for g in members}) == pytest.approx(tower + one(found, "sensitivity", "text", 2)["value"])
    assert np.isfinite(tower)


def test_steps_stay_and_the_name_says_the_budget(model: nn.Module, found: Results, images: ImageSet) -> None:
    base = qclip.recipes.get("w4a8-smoothquant")
    chosen = qclip.budgeted(model, "4.5bit", found, base)
    assert chosen.steps == base.steps and chosen.name == "4.5bit-a8-smoothquant"
    assert Recipe.from_dict(chosen.to_dict()) == chosen


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--bits", "2,8", "--images", "8", "--no-cache"]
    out = tmp_path / "found"
    assert main(["sensitivity", "scenes-clean", "--data", "scenes:dev", *few, "--output", str(out)]) == 0
    assert "towers alone" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "Sensitivity of sites" in page and "text tower" in page
    for line in (
        ["sensitivity", "scenes-clean", "--data", "scenes:dev", "--bits", "2,x"],
        ["sensitivity", "scenes-clean", "--data", "scenes:dev", "--bits", "9"],
        ["quantize", "scenes-clean", "--budget", "4.5bit"],
        ["quantize", "scenes-clean", "--budget", "4.5", "--calibration", "scenes:dev"],
    ):
        assert main([*line, *(["--output", str(tmp_path / "q")] if line[0] == "quantize" else [])]) == 2
        assert capsys.readouterr().err.count("\n") <= 3
