from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import entropy as scipy_entropy
from scipy.stats import pearsonr
from sklearn.metrics import log_loss

from qclip.metrics.human import correlation, cross_entropy, entropy


def test_cross_entropy_is_the_log_loss_of_every_persons_vote() -> None:
    rng = np.random.default_rng(0)
    logits, counts = (
        rng.normal(0, 4, (40, 6)),
        rng.integers(0, 9, (40, 6)) + np.eye(6, dtype=int)[rng.integers(0, 6, 40)],
    )
    shares = counts / counts.sum(1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for i, votes in enumerate(counts):
        people = np.repeat(np.arange(6), votes)
        expected = log_loss(people, np.tile(p[i], (len(people), 1)), labels=np.arange(6))
        assert cross_entropy(logits, shares)[i] == pytest.approx(expected, rel=1e-12)
    assert np.isfinite(cross_entropy(logits * 1e4, shares)).all()


def test_entropy_is_scipys_and_that_of_one_opinion_is_zero() -> None:
    shares = np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]])
    np.testing.assert_allclose(entropy(shares), scipy_entropy(shares, axis=1), atol=1e-15)


def test_correlation_is_pearsons_on_every_resample() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=60)
    y = 1e6 + x + rng.normal(size=60)
    counts = rng.multinomial(60, np.full(60, 1 / 60), 30).T
    found = correlation(x, y).on(counts)
    for column, value in zip(counts.T, found, strict=True):
        rows = np.repeat(np.arange(60), column)
        assert value == pytest.approx(pearsonr(x[rows], y[rows])[0], abs=1e-10)


def test_what_is_constant_correlates_with_nothing() -> None:
    x = np.random.default_rng(1).normal(size=20)
    assert np.isnan(correlation(x, np.full(20, 0.1)).plain()) and np.isnan(correlation(np.zeros(20), x).plain())
