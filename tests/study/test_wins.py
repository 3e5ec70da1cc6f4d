"""A joint win is a better accuracy, calibration and mean AUROC over OOD sets."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from qclip.study.plan import Measured
from qclip.study.wins import counted

N = 100


def images(right: int = 60, confidence: float = 0.9, above: tuple[int, int] = (70, 70)) -> pa.Table:
    """A model that is right on so many of `N` images, all at one confidence, and scores so many of them above all of
    each of two OOD sets, the others below."""
    predicted = np.where(np.arange(N) < right, 0, 1)
    inside = {
        "role": ["id"] * N,
        "set": ["s"] * N,
        "label": np.zeros(N, np.int64),
        "predicted": predicted,
        "rank": predicted,
        "confidence": np.full(N, confidence),
        "nll": np.ones(N),
        "brier": np.ones(N),
        "score_mcm": np.arange(N, dtype=float),
    }
    parts = [pa.table(inside)]
    for name, count in zip("xy", above, strict=True):
        scores = {"role": ["ood-far"] * N, "set": [name] * N, "score_mcm": np.full(N, N - count - 0.5)}
        parts.append(pa.table({key: scores.get(key, [None] * N) for key in inside}, parts[0].schema))
    return pa.concat_tables(parts)


@pytest.mark.parametrize(
    ("change", "wins"),
    [
        ({"right": 80, "confidence": 0.85, "above": (80, 80)}, 1),
        ({"right": 50, "confidence": 0.55, "above": (80, 80)}, 0),  # accuracy
        ({"right": 61, "confidence": 0.99, "above": (80, 80)}, 0),  # calibration
        ({"right": 80, "confidence": 0.85, "above": (60, 60)}, 0),  # detection
        ({"right": 80, "confidence": 0.85, "above": (90, 40)}, 0),  # of the mean
        ({"right": 80, "confidence": 0.85, "above": (40, 100)}, 0),  # 70 on the mean: as good, not better
        ({"right": 80, "confidence": 0.85, "above": (60, 90)}, 1),
    ],
)
def test_a_win_is_in_all_three(change: dict, wins: int) -> None:
    found = counted([images(), images(**change)], "mcm", Measured(replicates=20))
    assert found is not None and found.count == wins


def test_a_score_that_was_not_measured_wins_nothing() -> None:
    assert counted([images(), images()], "energy", Measured(replicates=20)) is None
