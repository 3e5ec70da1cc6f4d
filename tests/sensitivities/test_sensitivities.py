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
from qclip.errors import InputError, NonFiniteError, RecipeError
from qclip.layers import grid_bits
from qclip.recipes import METHODS, Treatment, step
from qclip.sensitivities import Budget, budget, groups
from tests.small import IMAGES, small_clip

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
    assert {row["n"] for row in rows} == {24}  # captions as well
    # Of a text site, classes are those of the quantized text tower.
    assert all(one(found, "sensitivity_kl", f"text.blocks.1.mlp.{each}", 2)["value"] > 1e-6 for each in ("fc1", "fc2"))
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
                bits += grid_bits(chosen.plan(site.name, site.kind).grid, *site.module.weight.flatten(1).shape)
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
    nearest = str(caught.value).split("can is ")[1].split(" ")[0]
    assert {plan.weight_bits for _, plan in qclip.budgeted(model, nearest, found).exceptions} <= {2}
    with pytest.raises(RecipeError, match="cannot be met"):
        qclip.budgeted(model, f"{float(nearest.removesuffix('bit')) - 0.0011}bit", found)
    with pytest.raises(RecipeError, match=r"the nearest that can is \S+MB") as caught:
        qclip.budgeted(model, "1kB", found)
    qclip.budgeted(model, str(caught.value).split("can is ")[1].split(" ")[0], found)


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


# -- what a recipe holds beside its codes ----------------------------------------------------------------------------


VISION = {"towers": ("vision",)}
SIDE = {
    "w4a8-smoothquant": step("smoothquant", tried=2, samples=2),
    "w4a8-static-awq": step("awq", strength=0.5, samples=4),
    "w4a8-rotation": step("rotation", outlying=1.0),
    "w4a8-static-repq-vit": step("repq-vit", samples=4),
    "w4a8-hqq": step("hqq"),
    "w4a8-svdquant": step("svdquant", tried=1, rounds=0),
    "w4a8-gptq": step("gptq"),
}


@pytest.mark.parametrize("name", SIDE)
@pytest.mark.filterwarnings("ignore:.*saw fewer inputs than channels")
def test_side_terms_are_within_the_budget(name: str, model: nn.Module, found: Results) -> None:
    """What a recipe's steps hold beside codes is counted, at most what it comes to."""
    base = Recipe(name, Treatment.named("w4a8", static="static" in name), steps=(SIDE[name],), **VISION)
    chosen = qclip.budgeted(model, "5.2bit", found, base)
    assert chosen.steps == base.steps
    small = qclip.quantize(model, chosen, IMAGES)
    assert 4.1 < _bits(small) <= 5.2
    plain = qclip.budgeted(model, "5.2bit", found, dataclasses.replace(base, steps=()))
    assert (chosen.exceptions, chosen.default) != (plain.exceptions, plain.default) or name == "w4a8-gptq"


@pytest.mark.parametrize("name", ["w4a8-smoothquant", "w4a8-static-repq-vit"])
def test_a_budget_in_bytes_counts_them_too(name: str, model: nn.Module, found: Results, tmp_path: Path) -> None:
    base = Recipe(name, Treatment.named("w4a8", static="static" in name), steps=(SIDE[name],), **VISION)

    def written(recipe: Recipe, folder: str) -> int:
        qclip.save(qclip.quantize(model, recipe, IMAGES), tmp_path / folder)
        content = (tmp_path / folder / "model.safetensors").read_bytes()
        return len(content) - 8 - int.from_bytes(content[:8], "little")  # without names and shapes

    size = written(qclip.budgeted(model, "4.9bit", found, base), "a")
    again = written(qclip.budgeted(model, f"{size / 1e3:.3f}kB", found, base), "b")
    assert 0.95 * size < again <= size


def _bits(small: nn.Module) -> float:
    return qclip.coverage(small).bits_per_weight or 0.0


def test_what_contradicts_a_budget_is_refused(model: nn.Module, found: Results) -> None:
    four = Treatment.named("w4a8")
    for base, word in (
        (qclip.recipes.get("w3.3a8-raana"), "gives sites their widths, and so does 'raana'"),
        (Recipe("x", Treatment(4, 8, 32)), "leave 'group' out of recipe 'x'"),
        (Recipe("x", Treatment(8, 8, weight_grid="symfull")), "leave 'weight_grid' out"),
        (Recipe("x", Treatment(8, 8, weight_scale="tensor")), "leave 'weight_scale' out"),
        (Recipe("x", four, (("*.fc2", "w4a16"),)), r"as w4a8, and recipe 'x' has an exception for that of \S+\.fc2"),
        (Recipe("x", four, (("*.v", Treatment(8, 8, static=True)),)), r"an exception for that of \S+\.v"),
    ):
        with pytest.raises(RecipeError, match=word):
            qclip.budgeted(model, "4.5bit", found, base)


def test_the_rest_of_the_recipe_stays(model: nn.Module, found: Results) -> None:
    plan = dataclasses.replace(
        Treatment.named("w4a8", static=True), weight_observer="mse", activation_grid="asym", activation_observer="ema"
    )
    base = Recipe(
        "mine", plan, (("vision.projection", "float"), ("*.v", dataclasses.replace(plan, weight_bits=8, group=None)))
    )
    chosen = qclip.budgeted(model, "4.5bit", found, base)
    with qclip.models.explicit_form(model) as towers:
        sites = [site for tower in towers.values() for site in tower]
        plans = {site.name: chosen.plan(site.name, site.kind) for site in sites if site.kind not in groups.FIXED}
    assert plans.pop("vision.projection") is None and len(plans) == 25
    assert len({each.weight_bits for each in plans.values()}) > 1
    for each in plans.values():
        assert each == dataclasses.replace(
            plan, weight_bits=each.weight_bits, group=Treatment.named(f"w{each.weight_bits}a8").group
        )


def test_a_swap_stays_within_the_budget_and_is_taken_where_it_is_better(model: nn.Module, found: Results) -> None:
    calls: list[dict[str, int]] = []

    def better_each_time(widths: dict[str, int]) -> float:
        calls.append(widths)
        return -float(len(calls))

    with qclip.models.explicit_form(model) as towers:
        members = groups.groups(towers, qclip.recipes.get("w4a8"))
        sizes = {(g.name, bits): g.bits(Treatment.named(f"w{bits}a8")) for g in members for bits in BITS}
        weights = sum(group.weights for group in members)

    def widths(whole: object) -> dict[str, int]:
        chosen = qclip.budgeted(model, "2.9bit", found, None, whole)
        return {g.name: chosen.plan(g.sites[0].name, g.sites[0].kind).weight_bits for g in members}

    plain, refined = widths(None), widths(better_each_time)
    assert min(plain.values()) <= budget.LOW and calls[0] == plain
    assert refined == calls[-1] and calls[1] != plain and len(calls) == 1 + budget.SWAPS
    for before, after in itertools.pairwise(calls):
        steps = [BITS.index(after[name]) - BITS.index(before[name]) for name in plain]
        assert sorted(steps)[:1] + sorted(steps)[-1:] == [-1, 1] and sum(map(abs, steps)) == 2  # one up, one down
        assert sum(sizes[each] for each in after.items()) <= 2.9 * weights
    names = {group.name: group.sites[0].name for group in members}
    harm = {(n, bits): max(one(found, "sensitivity", names[n], bits)["value"], 0.0) for n in names for bits in BITS}

    def swapped(up: str, down: str) -> dict[str, int]:
        return plain | {up: BITS[BITS.index(plain[up]) + 1], down: BITS[BITS.index(plain[down]) - 1]}

    ups, downs = ([n for n in names if plain[n] != end] for end in (BITS[-1], BITS[0]))
    tried = [swapped(up, down) for up, down in itertools.product(ups, downs) if up != down]
    tried = [each for each in tried if sum(sizes[n] for n in each.items()) <= 2.9 * weights]
    assert len(tried) > 2 and calls[1] == min(tried, key=lambda each: sum(harm[n] for n in each.items()))
    assert widths(lambda _: 1.0) == plain  # none is better
    calls.clear()
    qclip.budgeted(model, "7bit", found, None, better_each_time)  # no site so low that damages would not add up
    assert calls == []


def test_what_is_kept_is_of_these_prompts_classes_and_widths(
    model: nn.Module, images: ImageSet, tmp_path: Path
) -> None:
    def rows(images: ImageSet, **given: object) -> list[dict]:
        return qclip.sensitivity(model, images, (2, 4), count=8, cache=tmp_path, **given).rows

    def told(rows: list[dict], metric: str) -> list[float]:
        return [row["value"] for row in rows if row["metric"] == metric and row["role"] == "tower"]

    first = rows(images)
    assert len(set(told(first, "sensitivity"))) == 4  # two towers, two widths
    others = {
        "prompts": dataclasses.replace(images, prompts=("{}", "no {} at all")),
        "classes": dataclasses.replace(images, classes=images.classes[::-1]),
        "labels": dataclasses.replace(images, labels=np.roll(images.labels, 1)),
    }
    for what, changed in others.items():
        again, fresh = rows(changed), qclip.sensitivity(model, changed, (2, 4), count=8, cache=False).rows
        assert [row["value"] for row in again] == [row["value"] for row in fresh], what
    assert told(rows(others["prompts"]), "sensitivity_kl") != told(first, "sensitivity_kl")


def test_a_model_without_tokenizer_has_images_alone(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_clip()
    monkeypatch.setattr(qclip.models.Encoders, "_tokenizer", lambda _: None)
    model.__dict__.pop("tokenizer", None)
    told = qclip.sensitivity(model, images, (4,), count=8, cache=False)
    assert {row["set"].split(".")[0] for row in told} == {"vision"} and {r["metric"] for r in told} == {"sensitivity"}


def test_embeddings_that_are_not_finite_are_told(images: ImageSet) -> None:
    model = small_clip()
    with torch.no_grad():
        model.visual.transformer.resblocks[1].mlp.c_fc.weight.mul_(1e38)
    with pytest.raises(NonFiniteError, match="embeddings of the vision tower are NaN or Inf"):
        qclip.sensitivity(model, images, (4,), count=8, cache=False)


def test_every_method_says_what_it_holds(model: nn.Module) -> None:
    """Of a weight [n, k], never less than the built layer; the others' are in the budgets above."""
    raana = METHODS.get("raana")(step("raana", centralize=True, held_out=0.05)[1])
    small = qclip.quantize(
        model,
        Recipe("x", Treatment(3, 8), steps=(("raana", raana.chosen),), towers=("vision",)),
        torch.randn(4, 3, 32, 32),
    )
    for site in qclip.towers(small)["vision"]:
        if site.kind != "patch":
            layer = site.module
            beside = layer.stored_bits - grid_bits(layer.grid, *layer.shape)
            assert beside == raana.side_bits(Treatment(3, 8), *layer.shape)


def test_an_exception_for_a_site_gives_way_to_the_budget(model: nn.Module, found: Results) -> None:
    """By its own name, as a budget itself writes them: chosen again, there is one for each site."""
    once = qclip.budgeted(model, "4.5bit", found)
    base = dataclasses.replace(once, name="again", default=Treatment.named("w4a8"))
    again = qclip.budgeted(model, "3bit", found, base)
    fresh = qclip.budgeted(model, "3bit", found)
    with qclip.models.explicit_form(model) as towers:
        for site in (site for tower in towers.values() for site in tower):
            assert again.plan(site.name, site.kind) == fresh.plan(site.name, site.kind)
    assert once.exceptions and {pattern for pattern, _ in once.exceptions} & {p for p, _ in again.exceptions}
