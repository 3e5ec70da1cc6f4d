"""Rank correlations are scipy's; p is that of permutations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qclip.study.correlations import correlations, over, spearman
from qclip.study.run import Ready
from tests.study.small import Told

scipy_stats = pytest.importorskip("scipy.stats", reason="needs scipy (extra test)")


@pytest.mark.parametrize("n", [5, 7, 12, 40])
def test_rho_is_scipy_s_and_p_is_near(n: int) -> None:
    draw = np.random.default_rng(n)
    x = draw.integers(0, 6, n).astype(float)  # with ties
    y = x + draw.normal(0, 3, n)
    rho, p = spearman(x, y)
    expected = scipy_stats.spearmanr(x, y)
    assert rho == pytest.approx(expected.statistic, abs=1e-12)

    def statistic(a: np.ndarray) -> float:
        return scipy_stats.spearmanr(a, y).statistic

    if n <= 7:
        exact = scipy_stats.permutation_test((x,), statistic, permutation_type="pairings", n_resamples=np.inf)
        tails = np.mean(np.abs(exact.null_distribution) >= abs(rho) - 1e-12)
        assert p == pytest.approx(tails, abs=1e-9)
    else:
        assert p == pytest.approx(expected.pvalue, abs=0.03)


def test_few_and_constant_variants_tell_nothing() -> None:
    assert all(math.isnan(v) for v in spearman(np.arange(4.0), np.arange(4.0)))
    assert all(math.isnan(v) for v in spearman(np.ones(9), np.arange(9.0)))
    assert spearman(np.arange(5.0), np.arange(5.0)) == (pytest.approx(1), pytest.approx(2 / 120))


def test_a_plan_without_spectra_has_none(small: tuple[Ready, Told]) -> None:
    assert correlations(small[0].grid, small[0].store) == []


def test_differences_under_corruptions_are_left_out() -> None:
    common = {"model": "m", "evaluation": "e", "corruption": "", "role": "id", "set": "s", "difference": None}
    lines = []
    for at in range(6):
        one = common | {"variant": f"v{at}"}
        lines.append(one | {"role": "tower", "set": "vision", "metric": "shape", "value": float(at)})
        lines.append(one | {"metric": "top1", "value": 0.5, "difference": float(at)})
        lines.append(one | {"metric": "top1", "value": 0.5, "difference": 1.0, "corruption": "fog"})
    (found,) = over(lines, ("top1",))
    assert found.rho == pytest.approx(1)
