"""Paired tests against scipy, scikit-learn, permutations and kernels of pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from qclip.errors import InputError
from qclip.metrics import delong, holm, mcnemar, wilcoxon
from qclip.metrics.paired import midranks


def pairs(lost: int, won: int, both: int = 7) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([1] * lost + [0] * won + [1] * both, bool),
        np.array([0] * lost + [1] * won + [1] * both, bool),
    )


def test_mcnemar_is_that_of_the_binomial() -> None:
    flips = mcnemar(*pairs(12, 25))
    assert (flips.lost, flips.won) == (12, 25)
    assert (flips.p, flips.exact_p) == pytest.approx((0.0336, 0.0470), abs=5e-5)
    for lost, won in ((0, 3), (5, 5), (40, 21), (3000, 3100)):
        least, n = min(lost, won), lost + won
        twice = 2 * scipy.stats.binom.cdf(least, n, 0.5)
        found = mcnemar(*pairs(lost, won))
        assert found.p == pytest.approx(min(1, twice - scipy.stats.binom.pmf(least, n, 0.5)), rel=1e-8)
        assert found.exact_p == pytest.approx(scipy.stats.binomtest(least, n).pvalue, rel=1e-8)
    assert (mcnemar(*pairs(0, 0)).p, mcnemar(*pairs(0, 0)).exact_p) == (1, 1)


def by_pairs(ids: np.ndarray, oods: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and its covariance from the kernel of all pairs (DeLong et al. 1988)."""
    kernel = [(a[:, None] > o) + (a[:, None] == o) / 2 for a, o in zip(ids, oods, strict=True)]
    of_ids, of_oods = (np.stack([k.mean(axis) for k in kernel]) for axis in (1, 0))
    return of_ids.mean(1), np.cov(of_ids) / ids.shape[1] + np.cov(of_oods) / oods.shape[1]


@pytest.mark.parametrize("ties", [False, True])
def test_delong_equals_the_kernel_of_all_pairs(ties: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        n, m = int(rng.integers(2, 40)), int(rng.integers(2, 40))
        base = rng.normal(size=n + m)
        scores = base + rng.normal(size=(3, n + m)) * [[0.5], [1.0], [2.0]]
        scores[:, :n] += 0.7
        if ties:
            scores = np.round(scores * 2) / 2
        found = delong(scores[:, :n], scores[:, n:])
        auroc, covariance = by_pairs(scores[:, :n], scores[:, n:])
        np.testing.assert_allclose(found.auroc, auroc, atol=1e-12)
        np.testing.assert_allclose(found.covariance, covariance, atol=1e-12)
        truth = np.r_[np.ones(n), np.zeros(m)]
        assert found.auroc[1] == pytest.approx(roc_auc_score(truth, scores[1]), abs=1e-12)
        contrast = np.array([-1.0, 0, 1])
        if (variance := contrast @ covariance @ contrast) > 1e-9:
            z = contrast @ auroc / math.sqrt(variance)
            assert found.p(2) == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), rel=1e-9)


def test_delong_without_variance_says_nothing_or_equal() -> None:
    ids, oods = np.array([[1.0, 2, 3], [1, 2, 3], [0, 0, 0]]), np.array([[-1.0, 0], [-1, 0], [1, 1]])
    found = delong(ids, oods)
    assert found.p(1) == 1  # the same scores
    assert math.isnan(found.p(2))  # 1 and 0, without any spread
    assert math.isnan(delong(ids[:, :1], oods).p(1))
    with pytest.raises(InputError, match="not those of the same models"):
        delong(ids, oods[:2])


def test_midranks_are_those_of_scipy() -> None:
    values = np.round(np.random.default_rng(0).normal(size=200), 1)
    np.testing.assert_array_equal(midranks(values), scipy.stats.rankdata(values))


def by_all_signs(d: np.ndarray) -> float:
    """Pratt's zeros: ranked, then left out. Every choice of signs is as likely."""
    ranks = scipy.stats.rankdata(np.abs(d))[d != 0]
    seen = ranks[d[d != 0] > 0].sum()
    sums = np.array([ranks[list(signs)].sum() for signs in itertools.product([False, True], repeat=len(ranks))])
    return min(1.0, 2 * min((sums <= seen + 1e-9).mean(), (sums >= seen - 1e-9).mean()))


def test_wilcoxon_is_counted_over_all_signs() -> None:
    rng = np.random.default_rng(0)
    for n in range(6, 13):
        for _ in range(4):
            d = rng.normal(0.3, 1, n)
            assert wilcoxon(d) == pytest.approx(scipy.stats.wilcoxon(d, method="exact").pvalue, rel=1e-12)
            rounded = np.round(d)
            assert wilcoxon(rounded) == pytest.approx(by_all_signs(rounded) if rounded.any() else 1, rel=1e-12)
    d = rng.normal(0.2, 1, 25)
    assert wilcoxon(d) == pytest.approx(scipy.stats.wilcoxon(d, method="exact").pvalue, rel=1e-12)
    many = np.round(rng.normal(0.2, 1, 60), 1)
    theirs = scipy.stats.wilcoxon(many, zero_method="pratt", method="asymptotic", correction=False).pvalue
    assert wilcoxon(many) == pytest.approx(theirs, rel=1e-9)
    assert math.isnan(wilcoxon([1.0, 2, 3, 4, 5]))  # the least that five pairs can give is .0625
    assert wilcoxon([1.0, 2, 3, 4, 5, 6]) == pytest.approx(2 / 64)
    assert wilcoxon(np.zeros(8)) == 1


def test_holm_is_bonferroni_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    found = holm([0.02, math.nan, 0.01])
    assert found[[0, 2]] == pytest.approx([0.02, 0.02]) and math.isnan(found[1])  # nan is no test of the family
    assert holm([]).shape == (0,)
