"""Overlap of nearest neighbours: against sorting by hand, and as a measurement."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from qclip.errors import InputError
from qclip.metrics.neighbours import neighbour_recall
from qclip.reliability import evaluate
from tests.reliability.fakes import Tiny, pictures


def unit(n: int, width: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def by_sorting(queries: np.ndarray, index: np.ndarray, k: int, own: np.ndarray | None) -> list[set[int]]:
    found = []
    for q, cosines in enumerate(queries @ index.T):
        order = sorted(range(len(index)), key=lambda i: (-cosines[i], i))
        found.append(set([i for i in order if own is None or i != own[q]][:k]))
    return found


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "tied"])
def test_recall_is_that_of_sorting(own: bool, coarse: bool) -> None:
    old, new = unit(300, 6, 0), unit(300, 6, 0) + 0.2 * unit(300, 6, 1)
    if coarse:  # cosines of few values: most of them tie
        old, new = np.round(2 * old) / 4, np.round(2 * new) / 4
    rows = np.arange(300) if own else None
    found = neighbour_recall(new, old, old, old, (1, 7, 50, 299), rows)
    for k, shares in found.items():
        ours, theirs = by_sorting(new, old, k, rows), by_sorting(old, old, k, rows)
        assert shares.tolist() == [len(a & b) / k for a, b in zip(ours, theirs, strict=True)], k


def test_recall_is_that_of_scikit_learn() -> None:
    old, new = unit(200, 12, 2), unit(200, 12, 2) + 0.1 * unit(200, 12, 3)
    new /= np.linalg.norm(new, axis=1, keepdims=True)
    tree = NearestNeighbors(n_neighbors=10).fit(old)
    ours, theirs = tree.kneighbors(new, return_distance=False), tree.kneighbors(old, return_distance=False)
    wanted = [len(set(a) & set(b)) / 10 for a, b in zip(ours, theirs, strict=True)]
    assert neighbour_recall(new, old, old, old, [10])[10].tolist() == wanted


def test_a_model_finds_all_of_its_own() -> None:
    old = unit(40, 5, 4)
    old[7] = old[3]  # an image twice
    found = neighbour_recall(old, old, old, old, (1, 5, 39), np.arange(40))
    assert all((shares == 1).all() for shares in found.values())


def test_too_few_images_and_other_widths_are_refused() -> None:
    old = unit(10, 5, 5)
    with pytest.raises(InputError, match="10 neighbours of a query cannot be found among 9 other images"):
        neighbour_recall(old, old, old, old, [10], np.arange(10))
    with pytest.raises(InputError, match="of one width"):
        neighbour_recall(unit(10, 4, 5), old, old, old, [1])


@pytest.fixture
def fake_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", Tiny.encoders)


@pytest.mark.usefixtures("fake_encoders")
def test_images_without_labels_are_compared_and_nothing_else() -> None:
    results = evaluate(
        {"float": Tiny(), "same": Tiny(), "other": Tiny(0.4)},
        images=pictures(strange=True),
        texts=["ant", "a small bee", "the cat"],
        neighbours=(1, 10),
        cache=False,
    )
    assert results.unique("role") == ["model", "images"] or results.unique("role") == ["images"]
    for name in ("index_recall", "index_recall_reverse", "text_recall", "text_recall_reverse"):
        found = results.where(metric=name)
        assert [(row["model"], row["at"]) for row in found] == [(m, k) for m in ("same", "other") for k in (1, 10)]
        assert all(row["value"] == 1 for row in found.where(model="same"))
        assert {row["n"] for row in found} == {90 if name.startswith("index") else 3}
    other = results.row(model="other", metric="index_recall", axis="neighbours", at=10, reference="float")
    assert other is not None and 0 < other["low"] < other["value"] < other["high"] < 1
    assert not results.where(metric="top1").rows and not results.where(metric="agreement").rows
    assert results.value(model="same", metric="cosine_mean", reference="float") == pytest.approx(1)


@pytest.mark.usefixtures("fake_encoders")
def test_what_cannot_be_compared_is_noted() -> None:
    few = evaluate({"float": Tiny(), "other": Tiny(0.4)}, images=pictures(n=6), neighbours=(1, 10), cache=False)
    assert any("6 images are too few for 10 neighbours" in note for note in few.notes)
    assert {row["at"] for row in few.where(metric="index_recall")} == {1}
    texts = {"texts": ["ant", "bee"], "cache": False}
    none = evaluate({"float": Tiny(), "other": Tiny(0.4)}, images=pictures(n=6), neighbours=(6,), **texts)
    assert any("6 images are too few for 6 neighbours" in note for note in none.notes)
    assert not none.where(metric="index_recall").rows  # but of a text all six can be found
    assert none.value(model="other", metric="text_recall", axis="neighbours", at=6, reference="float") == 1
    one = evaluate({"float": Tiny(), "other": Tiny(0.4)}, images=pictures(n=4, bad=[0, 1, 3]), **texts)
    assert one.value(model="other", metric="cosine_mean", reference="float") is not None
    assert neighbour_recall(unit(3, 4, 0), unit(3, 4, 1), unit(3, 4, 0), unit(3, 4, 1), []) == {}
    wide = evaluate({"float": Tiny(), "wide": Tiny(width=20)}, images=pictures(), neighbours=(1,), cache=False)
    assert any("differ in width" in note for note in wide.notes) and not wide.where(metric="index_recall").rows


def test_numbers_of_neighbours_are_checked() -> None:
    with pytest.raises(InputError, match="neighbours=0 is no number"):
        evaluate({"a": Tiny()}, images=pictures(), neighbours=(0,), cache=False)
    with pytest.raises(InputError, match="no labelled set beside them"):
        evaluate({"a": Tiny()}, images=pictures(), ood=pictures("far", strange=True), cache=False)
