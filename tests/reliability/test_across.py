from __future__ import annotations

import numpy as np
import pytest

from qclip.metrics import holm, wilcoxon
from qclip.reliability.across import across_models
from qclip.results import Results


def table(models: int, recipes: tuple[str, ...] = ("w8a8", "w4a8")) -> tuple[Results, dict]:
    rng, results, truth = np.random.default_rng(0), Results(), {}
    for i in range(models):
        for recipe in recipes:
            for metric in ("top1", "ece", "brier"):
                value = float(rng.normal(0.1, 0.2))
                truth.setdefault((recipe, metric), []).append(value)
                common = {"model": f"m{i} {recipe}", "recipe": recipe, "metric": metric, "set": "pets", "role": "id"}
                results.add(**common, value=0.5)
                results.add(**common, value=value, reference=f"m{i} float")
                results.add(**common, value=9.0, reference=f"m{i} float", corruption="fog", severity=1)
                results.add(**common, value=9.0, reference=f"m{i} float", axis="group", at="sea")
    return results, truth


def test_each_recipe_is_tested_over_models_and_the_family_is_corrected() -> None:
    results, truth = table(8)
    across_models(results)
    keys = [(recipe, metric) for recipe in ("w8a8", "w4a8") for metric in ("top1", "ece")]
    expected = [wilcoxon(truth[key]) for key in keys]
    where = {"model": "", "set": "pets", "axis": "recipe"}
    found = [results.row(**where, at=recipe, metric=f"{metric}_wilcoxon_p") for recipe, metric in keys]
    assert [row["value"] for row in found] == pytest.approx(expected) and {row["n"] for row in found} == {8}
    corrected = [results.value(**where, at=recipe, metric=f"{metric}_wilcoxon_holm_p") for recipe, metric in keys]
    assert corrected == pytest.approx(holm(expected))
    assert any("family is 4 tests" in note for note in results.notes)


def test_few_models_are_too_few_and_one_is_not_tested() -> None:
    results, _ = table(5)
    across_models(results)
    assert results.row(model="", set="pets", axis="recipe", at="w8a8", metric="ece_wilcoxon_p")["value"] is None
    assert any("too few" in note for note in results.notes)
    alone, _ = table(1)
    before = len(alone)
    across_models(alone)
    assert len(alone) == before and not alone.notes
