"""A pick keeps the limits; what is beaten in everything is told from what is not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qclip.artifact import bytes_of
from qclip.errors import InputError
from qclip.study import choose
from qclip.study.cells import quantize_key
from qclip.study.choose import Candidate, _beats, _broken, _order
from qclip.study.run import Ready
from qclip.study.store import StudyStore
from tests.study.small import Told


def candidate(name: str, size: float, preferred: float | None, loss: float = 0.0) -> Candidate:
    return Candidate("m", name, size, None, preferred, {"top1": (loss, loss + 1)})


def test_one_beats_another_only_where_it_is_nowhere_worse() -> None:
    one, larger, better = candidate("a", 1, 0.9), candidate("b", 2, 0.9), candidate("c", 2, 0.95)
    assert _beats(one, larger, 1) and not _beats(larger, one, 1)
    assert not _beats(one, better, 1) and not _beats(better, one, 1)
    assert not _beats(one, candidate("d", 1, 0.9), 1)
    assert _beats(candidate("e", 1, 0.1), candidate("f", 1, 0.2), -1)  # of an error less is better


def test_limits_are_kept() -> None:
    limits = choose.Limits("top1", max_size=10, max_loss={"top1": 0.5})
    assert _broken(candidate("a", 10, 0.9, 0.5), limits) == []
    assert _broken(candidate("a", 10, 0.9, 0.5 + 1e-15), limits) == []
    assert _broken(candidate("a", 11, 0.9, 0.6), limits) == ["too large: 11 B", "loses 0.60 of top1"]
    assert _broken(candidate("a", 1, None), limits) == ["top1 is undefined or was not measured"]
    broken = choose.Limits("top1", max_latency=5, max_loss={"ece": 1})
    assert len(_broken(candidate("a", 1, 0.9), broken)) == 2


def test_the_pick_comes_first() -> None:
    found = [candidate("a", 2, 0.9), candidate("b", 1, 0.9), candidate("c", 1, 0.99)]
    found[2].why = ["too slow"]
    assert [each.variant for each in sorted(found, key=lambda each: _order(each, 1))] == ["b", "a", "c"]


@pytest.mark.parametrize(("text", "number"), [("60MB", 60e6), ("1.5 GB", 1.5e9), ("4096", 4096), ("3kb", 3000)])
def test_sizes(text: str, number: float) -> None:
    assert choose.size(text) == number


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e9", "60XB", "nan", "9" * 30])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no size"):
        choose.size(text)


def test_times_and_losses() -> None:
    assert [choose.milliseconds(text) for text in ("10ms", "0.5s", "7")] == [10, 500, 7]
    assert choose.losses(["top1=0.5", "ece=-1"]) == {"top1": 0.5, "ece": -1}
    for bad in (["top1"], ["top1=x"], ["top1=1", "top1=2"]):
        with pytest.raises(InputError):
            choose.losses(bad)


def chosen(ready: Ready, store: StudyStore, **limits: Any) -> dict[str, Candidate]:
    return {each.variant: each for each in choose.choose(ready.grid, store, choose.Limits(**limits))}


def test_a_size_is_that_of_what_is_shipped(small: tuple[Ready, Told]) -> None:
    ready = small[0]
    found = chosen(ready, ready.store, prefer="top1")
    assert found["float"].size == ready.grid.facts.bytes["scenes-clean"]
    assert found["float"].bits == pytest.approx(32, rel=0.01)
    for block in ready.grid.blocks[1:]:
        key = quantize_key(block.variant, ready.grid.facts, False)
        (folder,) = (ready.store.folder / "artifacts").glob(f"{key}-*")
        each, recipe = found[block.variant.label], block.variant.recipe
        assert each.size == bytes_of(folder) and each.memory is not None and recipe is not None
        assert each.bits == pytest.approx(32 * each.size / found["float"].size, rel=0.01)
        assert each.bits > recipe.default.weight_bits  # scales, and what stays float
    assert found["w8a8"].size < 0.3 * found["float"].size


def test_a_size_that_nobody_knows_keeps_no_limit(small: tuple[Ready, Told], tmp_path: Path) -> None:
    ready = small[0]
    shutil.copytree(ready.store.folder, tmp_path / "store", ignore=shutil.ignore_patterns("artifacts", "embeddings"))
    store = StudyStore.open(tmp_path / "store")
    found = chosen(ready, store, prefer="top1", max_size=1e12)
    assert found["w8a8"].size is None and found["w8a8"].bits is None and found["w8a8"].memory is not None
    assert found["w8a8"].why == ["its size is not known: its artifact is not in the store"]
    assert found["float"].why == [] and chosen(ready, store, prefer="top1")["w8a8"].why == []


def test_losses_and_what_is_preferred_are_those_of_the_rows(small: tuple[Ready, Told]) -> None:
    ready = small[0]
    found = chosen(ready, ready.store, prefer="ece", max_loss={"auroc": 50.0, "top1": 50.0, "ece": 50.0})
    rows = {
        (r["variant"], r["metric"], r["reference"]): r
        for r in ready.store.rows().to_pylist()
        if r["role"] in ("id", "ood-far") and not r["corruption"] and not r["axis"] and r["score"] in ("", "mcm")
    }
    for label in ("w8a8", "w4a8"):
        assert found[label].preferred == rows[label, "ece", ""]["value"]
        for name, side in (("top1", 1), ("auroc", 1), ("ece", -1)):
            row = rows[label, name, "float"]
            worst = row["low"] if side > 0 else row["high"]
            assert found[label].losses[name] == pytest.approx((-100 * side * row["value"], -100 * side * worst))
    assert found["float"].losses == dict.fromkeys(("auroc", "top1", "ece"), (0.0, 0.0))
    order = choose.choose(ready.grid, ready.store, choose.Limits("ece"))
    assert [each.preferred for each in order] == sorted(each.preferred for each in order if each.preferred is not None)
