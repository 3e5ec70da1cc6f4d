from __future__ import annotations

import numpy as np
import pytest

from qclip.metrics import retrieval
from qclip.metrics.retrieval import first_places


def by_sorting(similar: np.ndarray, owned: np.ndarray) -> list[int]:
    out = []
    for row, (first, last) in zip(similar, owned, strict=True):
        order = sorted(range(len(row)), key=lambda k: (-row[k], k))
        out.append(min(order.index(k) for k in range(first, last)))
    return out


@pytest.mark.parametrize("block", [1, 50, 1 << 24])
@pytest.mark.parametrize("ties", [False, True])
def test_places_are_those_of_a_stable_sort(block: int, ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "BLOCK", block)
    rng = np.random.default_rng(0)
    for _ in range(20):
        queries, gallery = rng.normal(size=(9, 4)), rng.normal(size=(23, 4))
        if ties:  # few values, whose products are exact
            queries, gallery = np.round(queries), np.round(gallery)
        first = rng.integers(0, 20, 9)
        owned = np.stack([first, first + rng.integers(1, 4, 9)], axis=1)
        similar = queries.astype(np.float32) @ gallery.astype(np.float32).T
        assert first_places(queries, gallery, owned).tolist() == by_sorting(similar, owned)


def test_of_equal_entries_the_lower_index_comes_first() -> None:
    gallery = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    queries = np.tile([[1.0, 0.0]], (4, 1))
    assert first_places(queries, gallery, np.array([[0, 1], [1, 2], [2, 3], [3, 4]])).tolist() == [0, 1, 2, 3]
    assert first_places(queries[:1], gallery, np.array([[1, 4]])).tolist() == [1]
