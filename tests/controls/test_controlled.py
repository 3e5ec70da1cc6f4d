"""Controls: arms differ from the recipe in one thing, finished ones are kept, its verdicts are of its rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import qclip
from qclip import controls as controlling
from qclip import rewrite
from qclip.controls import arms, run
from qclip.errors import InputError, RecipeError
from qclip.recipes import Treatment
from qclip.results import Results
from qclip.training import TrainingError

SETTINGS = {"steps": 2, "batch": 4, "pairs": 24, "held_out": 0.25, "rate": 1e-4}
SETS = {
    "data": "scenes:test?samples=40",
    "dev": "scenes:dev?samples=40",
    "ood": "scenes:far-ood?samples=20",
    "evaluation": {"corruptions": [], "cache": False},
}


def by_name(recipe: str, controls: list[str] | None = None, **settings) -> dict[str, controlling.Arm]:
    return {arm.name: arm for arm in arms(qclip.recipes.get(recipe), controls, **settings)}


def test_each_arm_differs_in_one_thing() -> None:
    every = list(controlling.CONTROLS)
    found = by_name("w4a8-lsq", every, steps=30, rate=3e-4, batch=16, objective="mse")
    assert list(found) == ["w4a8-lsq", *every]
    recipe = found["w4a8-lsq"]
    for name, arm in found.items():
        differ = {key for key, value in arm.settings.items() if value != recipe.settings[key]}
        assert differ == {
            "untrained": {"steps"},
            "float-tuned": {"steps", "logit_scale"},
            "lsq-authors": {"objective", "rate", "scale_rate", "logit_scale"},
        }.get(name, set()), name
        if name not in ("lsq-authors", "untrained", "w4a8-lsq"):
            assert arm.recipe.default == recipe.recipe.default or not arm.name.startswith("noise")
            assert arm.recipe.trained != recipe.recipe.trained
    assert found["lsq-authors"].settings["rate"] == 1e-5 and found["lsq-authors"].recipe.name == "w4a8-lsq-authors"
    assert "lsq-authors" not in by_name("w4a8-lsq-authors")
    rotated = by_name("w4a4-rotation+lsq")
    assert by_name("w4a4-lsq")["float-continued"].recipe == found["float-continued"].recipe
    assert rotated["float-continued"].recipe.steps == rotated["w4a4-rotation+lsq"].recipe.steps
    codes = by_name("w4a4-rotation+gptq+lsq")
    for name in ("float-continued", "noise"):
        assert [method for method, _ in codes[name].recipe.steps] == ["rotation"]


def test_what_cannot_be_studied() -> None:
    for recipe, told in (("w4a8", "computed, not trained"), ("w4a8-noise", "a control itself")):
        with pytest.raises(RecipeError, match=told):
            by_name(recipe)
    with pytest.raises(InputError, match="unknown control 'nois'; did you mean 'noise'"):
        by_name("w4a8-lsq", ["nois"])
    with pytest.raises(InputError, match="named twice"):
        by_name("w4a8-lsq", ["noise", "noise"])
    with pytest.raises(InputError, match="fitted on held-out pairs"):
        by_name("w4a8-lsq", held_out=0.0)


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("arms")
    model = qclip.load_model("scenes-clean")
    controls = ["float-continued", "float-tuned", "noise"]
    results = qclip.controlled(
        model, "w2a8-lsq", "scenes:train", folder, seeds=2, controls=controls, **SETS, **SETTINGS
    )
    return folder, results


def test_results_hold_runs_means_and_differences(studied: tuple[Path, Results]) -> None:
    _, results = studied
    (where,) = results.where(metric="top1", role="id").unique("set")
    for name in ("w2a8-lsq", "float-continued", "noise", "float-tuned"):
        each = [results.value(model=f"{name} seed {seed}", metric="nll", set=where) for seed in (0, 1)]
        assert results.value(model=name, metric="nll", set=where) == pytest.approx(np.mean(each))
        assert results.row(model=name, metric="nll", set=where, reference="float") is not None
    assert results.row(model="w2a8-lsq", metric="nll_ts", set=where, reference="noise")["value"] is not None
    p = results.where(metric="difference_holm_p", model="w2a8-lsq")
    assert {row["reference"] for row in p} == {"float", "float-continued", "float-tuned", "noise"}
    assert {"top1", "balanced_accuracy", "nll", "nll_ts", "ece", "ece_ts", "auroc"} == {row["at"] for row in p}
    assert any("float-tuned: the float model with its logit scale fitted" in note for note in results.notes)


def test_finished_arms_are_kept_and_others_refused(
    studied: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = studied
    assert sorted(p.name for p in folder.iterdir() if not p.name.endswith(".training")) == sorted(
        f"{name}-seed{seed}" for name in ("w2a8-lsq", "float-continued", "float-tuned", "w2a8-noise") for seed in (0, 1)
    )
    assert not list(folder.rglob("step-*.safetensors"))
    noise = qclip.load(folder / "w2a8-noise-seed1")
    assert not rewrite.is_quantized(noise) and rewrite.is_quantized(qclip.load(folder / "w2a8-lsq-seed0"))
    monkeypatch.setattr(run, "train", lambda *_, **__: pytest.fail("an arm was trained again"))
    behind = folder / "w2a8-lsq-seed0.training" / "step-0000002.safetensors"  # of a run that was killed at its end
    behind.write_bytes(b"left")
    model = qclip.load_model("scenes-clean")
    controls = ["float-continued", "float-tuned", "noise"]
    again = qclip.controlled(model, "w2a8-lsq", "scenes:train", folder, seeds=2, controls=controls, **SETS, **SETTINGS)
    assert [row for row in again if row["metric"] == "nll"] == [row for row in results if row["metric"] == "nll"]
    assert not behind.exists()
    for change, told in (
        ({"rate": 2e-4}, "whose rate is 0.0001, and this one's is 0.0002"),
        ({"pairs": 20}, "whose pairs is"),
    ):
        with pytest.raises(InputError, match=told):
            qclip.controlled(
                model, "w2a8-lsq", "scenes:train", folder, seeds=2, controls=controls, **SETS, **SETTINGS | change
            )
    with pytest.raises(InputError, match="whose data is"):
        qclip.controlled(model, "w2a8-lsq", "scenes:dev", folder, seeds=2, controls=controls, **SETS, **SETTINGS)
    other = qclip.load_model("scenes-noisy")
    with pytest.raises(InputError, match="whose model is"):
        qclip.controlled(other, "w2a8-lsq", "scenes:train", folder, seeds=2, controls=controls, **SETS, **SETTINGS)


def test_what_is_needed(tmp_path: Path) -> None:
    model = qclip.load_model("scenes-clean")
    with pytest.raises(InputError, match="name dev"):
        qclip.controlled(model, "w4a8-lsq", "scenes:train", tmp_path, **SETS | {"dev": None})
    with pytest.raises(InputError, match="'scenes:test' is the test and dev: .*; name another dev"):
        qclip.controlled(
            model, "w2a8-lsq", "scenes:train", tmp_path, data=["scenes:dev", "scenes:test"], dev="scenes:test"
        )
    with pytest.raises(InputError, match="seeds must be at least 1"):
        qclip.controlled(model, "w4a8-lsq", "scenes:train", tmp_path, seeds=0, **SETS)
    with pytest.raises(InputError, match="is trained from a float one"):
        qclip.controlled(qclip.quantize(model, "w8a8"), "w4a8-lsq", "scenes:train", tmp_path, **SETS)
    assert not list(tmp_path.iterdir())


def test_the_page_shows_the_means(studied: tuple[Path, Results]) -> None:
    from qclip.reporting import html
    from qclip.reporting.controlled import findings, means

    _, results = studied
    lines = findings(results)
    assert lines[0].startswith("w2a8-lsq against float") and len(lines) == 8
    page = html(means(results))
    assert "The recipe and its controls" in page and "w2a8-lsq seed 0" not in page


def test_each_run_has_its_seed_and_its_own_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, runs = qclip.load_model("scenes-clean"), [], {}

    def train(*given, **settings):
        _, recipe, drawn, output = given
        seen.append((output.name, recipe.name, drawn.description["seed"], settings["seed"]))
        return model

    def evaluate(models, *_, **given) -> Results:
        runs.update(given["runs"])
        assert list(models) == ["float", *(label for labels in zip(*runs.values(), strict=True) for label in labels)]
        return Results()

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(run, "evaluate", evaluate)
    monkeypatch.setattr(run.artifact, "save", lambda *_: None)
    monkeypatch.setattr(run.artifact, "load", lambda *_: model)
    controls = ["noise", "lsq-authors"]
    given = SETS | SETTINGS
    qclip.controlled(model, "w4a8-lsq", "scenes:train", tmp_path, seeds=2, seed=3, controls=controls, **given)
    names = ("w4a8-lsq", "w4a8-noise", "w4a8-lsq-authors")
    assert seen == [(f"{name}-seed{k}.training", name, k, k) for k in (3, 4) for name in names]
    assert runs == {name: [f"{name} seed 3", f"{name} seed 4"] for name in ("w4a8-lsq", *controls)}


def test_an_arm_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*given, **_):
        raise TrainingError(f"{given[1].name} stopped")

    monkeypatch.setattr(run, "train", train)
    with pytest.raises(TrainingError, match="^w4a8-lsq seed 5: w4a8-lsq stopped$"):
        qclip.controlled(
            qclip.load_model("scenes-clean"), "w4a8-lsq", "scenes:train", tmp_path, seed=5, **SETS, **SETTINGS
        )


def test_controls_keep_the_recipe_s_sites_and_shared_settings() -> None:
    recipe = dataclasses.replace(
        qclip.recipes.get("w4a8-lsq"), towers=("vision",), exceptions=(("vision.patch", None), ("*.fc2", Treatment(8)))
    )
    given = {"steps": 7, "batch": 5, "micro": 3, "held_out": 0.3, "pairs": 99, "save_every": 4, "warmup": 0.2}
    found = {arm.name: arm for arm in arms(recipe, list(controlling.CONTROLS), **given)}
    for name in ("float-continued", "float-tuned"):
        each = found[name].recipe
        assert each.towers == ("vision",) and [pattern for pattern, _ in each.exceptions] == ["vision.patch", "*.fc2"]
        assert each.exceptions[0][1] is None and each.exceptions[1][1] == each.default
    for name in ("noise", "noise-measured"):
        trained = found[name].recipe.trained
        assert trained is not None and trained[0] == name
    assert found["noise"].recipe.exceptions == recipe.exceptions and found["noise"].recipe.towers == ("vision",)
    assert found["lsq-authors"].settings.items() >= given.items()
