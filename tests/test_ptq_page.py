"""docs/ptq.md is what its committed results say, and those are of recipes as they are now."""

from __future__ import annotations

import pytest

from benchmarks.ptq import FOLDER, PAGE, SETTINGS, variants
from benchmarks.ptq_page import Variant, page
from qclip import Results, recipes

FOUND = {path.stem: Results.from_json(path) for path in sorted(FOLDER.glob("*.json"))}


def test_the_page_is_that_of_its_results() -> None:
    assert set(FOUND) <= set(SETTINGS)
    assert PAGE.read_text() == page(FOUND), "write it again: python -m benchmarks.ptq write"


@pytest.mark.parametrize("name", FOUND)
def test_the_recipes_are_those_of_now(name: str) -> None:
    known = {row["model"]: row["recipe_hash"] for row in FOUND[name] if row["recipe_hash"]}
    assert known
    for recipe, *_ in variants(SETTINGS[name]):
        if recipe in known:
            assert known[recipe] == recipes.get(recipe).hash, f"measure {recipe} again"


def test_an_error_is_one_minus_the_mean_cosine_of_all_seeds() -> None:
    results = Results()
    for seed, cosine in (("", 0.9), (" seed 1", 0.8)):
        results.add(model=f"w3a8-raana{seed}", metric="cosine_mean", set="s", value=cosine, reference="float")
    found = Variant(results, "w3a8-raana")
    assert found.error == pytest.approx(0.15) and found.errors == pytest.approx([0.1, 0.2])
    assert Variant(results, "w3a8").error is None
