from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from qclip.spectral import intervals


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 9, 15, 100])
def test_students_quantile(freedom: int) -> None:
    assert intervals.student_t(0.975, freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=2e-3)


def test_the_interval_over_sites_is_students() -> None:
    values = np.random.default_rng(0).normal(size=20)
    found = intervals.over_sites(values)
    wanted = scipy.stats.t.interval(0.95, 19, values.mean(), scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx(wanted, rel=1e-5)
    assert intervals.over_sites(values[:1]).low is None  # one site says nothing about the others


def test_the_interval_of_draws_covers_one_draw_of_all_sites() -> None:
    """Simulated: 95 % of intervals hold the true mean, with what draws add to the spread."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        sites = rng.normal(size=(12, 1))
        found = intervals.over_sites(sites + rng.normal(size=(12, 8)))
        one_draw = float((rng.normal(size=(12, 1)) + rng.normal(size=(12, 1))).mean())
        inside += abs(one_draw) < (found.high - found.low) / 2
    assert 0.92 < inside / 400 < 0.98
    draws = rng.normal(size=8)
    one = intervals.one_more(draws)
    reach = scipy.stats.t.ppf(0.975, 7) * draws.std(ddof=1) * np.sqrt(1 + 1 / 8)
    assert (one.low, one.high) == pytest.approx((draws.mean() - reach, draws.mean() + reach), rel=1e-4)
