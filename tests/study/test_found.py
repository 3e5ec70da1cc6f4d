"""What is taken from a store: whole sets, one runtime a cell, one score, under the names of the plan that asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from benchmarks.study_report import PLAN, RUNTIME, synthetic
from qclip.errors import InputError
from qclip.study import choose
from qclip.study.cells import CLEAN, Grid, expand
from qclip.study.found import Asked, find, score_of
from qclip.study.page import variant_results
from qclip.study.plan import Plan
from qclip.study.rows import SCHEMA
from qclip.study.run import Ready
from qclip.study.sizes import Size
from qclip.study.store import StudyStore
from tests.study.small import Told
from tests.study.test_views import TEXT

ONE = TEXT.replace('"photos", ', "")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Grid, StudyStore]:
    """A store of one model with two variants, in one file of rows."""
    assert ONE != TEXT != PLAN
    return synthetic(tmp_path, ONE)


def add(store: StudyStore, change: Callable[[dict[str, Any]], dict[str, Any] | None], runtime: str = RUNTIME) -> None:
    """Put a file beside the one that is there, with its rows and changed ones."""
    rows = store.rows().to_pylist()
    changed = [row | new for row in rows if (new := change(row)) is not None]
    assert changed
    files = list(store.named("results", runtime))
    old = rows if runtime == RUNTIME else []
    store.write_many(runtime, pa.Table.from_pylist([*old, *(row | {"runtime": runtime} for row in changed)], SCHEMA))
    for _, name in files:
        store.files.remove(name)


@pytest.mark.parametrize("other", [{"subset": "class 3"}, {"axis": "severity"}, {"score": "energy"}])
def test_of_whole_sets_and_one_score_alone(other: dict[str, str], made: tuple[Grid, StudyStore]) -> None:
    expected = find(*made).lines
    add(made[1], lambda row: other | {"value": 0.123} if row["score"] or "score" not in other else None)
    assert find(*made).lines == expected


def test_a_cell_is_taken_from_one_runtime(made: tuple[Grid, StudyStore]) -> None:
    grid, store = made
    expected = find(grid, store).lines
    cell = grid.blocks[1].cells[CLEAN]
    add(store, lambda row: {"value": 0.123} if row["cell"] == cell else None, "other")
    found = find(grid, store)
    assert found.lines == expected and found.runtimes == [RUNTIME]


def renamed(plan: Plan) -> Plan:
    """Its first recipe under another name, as another plan may have it."""
    first, *rest = plan.recipes
    return dataclasses.replace(plan, recipes=(dataclasses.replace(first, name="mine"), *rest))


def test_what_another_plan_measured_has_this_plan_s_names(small: tuple[Ready, Told]) -> None:
    ready = small[0]
    grid = expand(renamed(ready.grid.plan), ready.grid.facts)
    assert grid.cells() == ready.grid.cells()
    before, after = find(ready.grid, ready.store).lines, find(grid, ready.store).lines
    assert [line["variant"] for line in after] == [{"w8a8": "mine"}.get(e["variant"], e["variant"]) for e in before]
    assert {(line["variant"], line["recipe"]) for line in after} == {
        ("float", ""),
        ("mine", "mine"),
        ("w4a8", "w4a8"),
    }
    assert [line["difference"] for line in after] == [line["difference"] for line in before]
    page = variant_results(grid, ready.store, grid.blocks[1], ready.work.runtime)
    assert page is not None and {row["model"] for row in page.rows if row["model"]} == {"float", "mine"}
    assert {curve["model"] for curve in page.curves} == {"float", "mine"} == set(page.meta["models"])


def test_a_failure_has_this_plan_s_names(made: tuple[Grid, StudyStore]) -> None:
    grid, store = made
    other = expand(dataclasses.replace(grid.plan, seeds=(0, 1)), grid.facts)
    store.fail(RUNTIME, cell := "f" * 32, {"variant": "theirs", "evaluation": "theirs", "error": "boom"})
    block = dataclasses.replace(other.blocks[1], cells={CLEAN: cell})
    found = find(dataclasses.replace(other, blocks=[*other.blocks, block]), store)
    assert found.failed[cell]["error"] == "boom"
    assert f"failed: {block.variant.label} on scenes:test: boom" in found.notes


def test_a_score_is_the_plan_s(made: tuple[Grid, StudyStore]) -> None:
    grid, store = made
    energy = dataclasses.replace(grid.plan, measured=dataclasses.replace(grid.plan.measured, scores=("energy",)))
    assert score_of(grid.plan) == "mcm" and score_of(energy) == "energy"
    assert find(dataclasses.replace(grid, plan=energy), store).score == "energy"
    with pytest.raises(InputError, match="no score 'mcm'; known: energy"):
        score_of(energy, "mcm")
    with pytest.raises(InputError, match="no corruption 'snow'"):
        find(grid, store, Asked(corruption="snow"))


def lost(*gaps: float | None) -> dict[str, tuple[float, float | None]]:
    lines = [
        {"metric": "auroc", "role": "ood-far", "value": 0.5, "difference": gap, "difference_low": gap}
        | {"difference_high": gap}
        for gap in gaps
    ]
    limits = choose.Limits("top1", max_loss={"auroc": 1.0})
    return choose._candidate("m", "w8a8", lines, limits, Size(1, 1.0)).losses


def test_of_several_sets_the_one_that_loses_most_counts() -> None:
    assert lost(-0.01, -0.03, 0.02) == {"auroc": (pytest.approx(3), pytest.approx(3))}


def test_a_loss_of_which_one_set_tells_nothing_is_not_known() -> None:
    assert lost(-0.01, float("nan")) == lost(None, -0.01) == {}
