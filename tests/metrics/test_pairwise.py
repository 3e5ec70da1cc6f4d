from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import log_loss

from qclip.metrics.pairwise import pair_bins, pair_ece, pair_losses, sigmoid

RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.normal(-2, 3, (50, 7)), RNG.integers(0, 7, 50)
MATCH = np.eye(7, dtype=bool)[LABELS]


def ece_of(p: np.ndarray, match: np.ndarray) -> float:
    """One pair at a time."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for each, hit in zip(p.ravel(), match.ravel(), strict=True):
        b = next(k for k in range(15) if each <= (k + 1) / 15)
        bins.setdefault(b, []).append((each, hit))
    return sum(abs(sum(h for _, h in pairs) - sum(c for c, _ in pairs)) for pairs in bins.values()) / p.size


def test_the_nll_is_scikit_learns_of_all_pairs() -> None:
    expected = log_loss(MATCH.ravel(), expit(LOGITS).ravel())
    assert pair_losses(LOGITS, LABELS).mean() == pytest.approx(expected, rel=1e-12)
    assert pair_losses(LOGITS * 1e4, LABELS).max() < np.inf


def test_sigmoid_overflows_nowhere() -> None:
    with np.errstate(over="raise"):
        z = np.array([-1e4, -40.0, 0.0, 40.0, 1e4])
        np.testing.assert_allclose(sigmoid(z), expit(z), rtol=1e-14)


def test_the_ece_is_that_of_all_pairs_on_every_resample() -> None:
    statistic = pair_ece(pair_bins(LOGITS, LABELS))
    assert statistic.plain() == pytest.approx(ece_of(expit(LOGITS), MATCH), abs=1e-14)
    counts = RNG.multinomial(50, np.full(50, 1 / 50), 10).T
    for column, value in zip(counts.T, statistic.on(counts), strict=True):
        rows = np.repeat(np.arange(50), column)
        assert value == pytest.approx(ece_of(expit(LOGITS)[rows], MATCH[rows]), abs=1e-14)
