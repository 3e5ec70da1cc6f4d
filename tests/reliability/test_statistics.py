from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from qclip.errors import InputError
from qclip.metrics import auroc
from qclip.metrics.arrays import ratio
from qclip.metrics.resampled import Statistic, Sums, evaluate_on, mean_of
from qclip.reliability.statistics import Resampling, bca, percentile
from qclip.seeds import generator


def ece_statistic(gap: np.ndarray, bins: np.ndarray, size: int = 15) -> Statistic:
    return Statistic([Sums(gap, bins, size), Sums(np.ones(len(gap)))], lambda s, n: ratio(np.abs(s).sum(0), n[0]))


def test_a_resampling_is_the_sample_then_multinomial_counts_then_blocks_left_out() -> None:
    drawn = Resampling.draw(500, generator(0, "a"), replicates=300, blocks=50)
    assert drawn.counts.shape == (500, 351)
    assert (drawn.counts[:, 0] == 1).all()
    replicates = drawn.counts[:, 1:301].astype(float)
    assert (replicates.sum(0) == 500).all()
    assert abs(replicates.mean() - 1) < 1e-12 and abs(replicates.var() - (1 - 1 / 500)) < 0.02  # Binomial(n, 1/n)
    left_out = drawn.counts[:, 301:]
    assert (left_out.sum(0) == 490).all() and (left_out == 0).any(0).all() and (left_out.sum(1) == 49).all()
    assert (Resampling.draw(500, generator(0, "a"), 300, 50).counts == drawn.counts).all()
    assert (Resampling.draw(500, generator(0, "b"), 300, 50).counts != drawn.counts).any()
    assert (Resampling.draw(500, generator(1, "a"), 300, 50).counts != drawn.counts).any()
    assert Resampling.draw(1, generator(0, "a"), 10).counts[:, :11].tolist() == [[1] * 11]
    with pytest.raises(InputError):
        Resampling.draw(0, generator(0, "a"))


@pytest.mark.parametrize("size", [15, 100])  # products with one-hot columns, and sums of runs
def test_statistics_equal_those_of_the_repeated_sample(size: int) -> None:
    rng = np.random.default_rng(0)
    values, bins = rng.normal(size=80), rng.integers(0, size, 80)
    mask = rng.random(80) < 0.5
    counts = Resampling.draw(80, rng, 40, 10).counts
    mean, ece = evaluate_on([mean_of(values).within(mask), ece_statistic(values, bins, size)], counts)
    for column in range(counts.shape[1]):
        rows = np.repeat(np.arange(80), counts[:, column])
        assert mean[column] == pytest.approx(values[rows][mask[rows]].mean(), abs=1e-12)
        by_bin = [abs(values[rows][bins[rows] == b].sum()) for b in range(size)]
        assert ece[column] == pytest.approx(sum(by_bin) / len(rows), abs=1e-12)


def test_a_mean_over_nothing_is_undefined_not_zero() -> None:
    counts = Resampling.draw(5, generator(0, ""), 20).counts
    (values,) = evaluate_on([mean_of(np.ones(5)).within(np.zeros(5, bool))], counts)
    assert np.isnan(values).all()
    estimate = percentile(values, 20)
    assert math.isnan(estimate.value) and math.isnan(estimate.low)
    assert math.isnan(bca(values, 20).high)


def test_bca_agrees_with_scipy_on_a_skewed_statistic() -> None:
    sample = np.random.default_rng(3).exponential(size=60)
    drawn = Resampling.draw(60, generator(0, "bca"), 20000, 60)
    weight = Sums(np.ones(60))
    variance = Statistic([Sums(sample), Sums(sample**2), weight], lambda s, q, n: q[0] / n[0] - (s[0] / n[0]) ** 2)
    (values,) = evaluate_on([variance], drawn.counts)
    ours, plain = bca(values, 20000), percentile(values, 20000)
    theirs = scipy.stats.bootstrap(
        (sample,), np.var, n_resamples=20000, method="BCa", vectorized=True, axis=-1, random_state=0
    ).confidence_interval
    assert ours.value == pytest.approx(np.var(sample))
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), rel=0.05)
    assert abs(plain.high - theirs.high) > 3 * abs(ours.high - theirs.high)  # the correction is what makes them agree


def test_the_percentile_interval_cuts_two_and_a_half_percent_off_each_end() -> None:
    drawn = np.concatenate([[7.0], np.random.default_rng(0).permutation(np.arange(1001.0)), np.full(20, 1e9)])
    estimate = percentile(drawn, 1001)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((7, 25, 975))


def test_equal_models_differ_by_exactly_nothing() -> None:
    drawn = np.zeros(1 + 100 + 20)
    for interval in (percentile, bca):
        estimate = interval(drawn, 100)
        assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)


def coverage(trials: int, draw, truth: float, interval) -> float:
    hits = 0
    for trial in range(trials):
        estimate = interval(draw(np.random.default_rng(trial)), 400)
        hits += estimate.low <= truth <= estimate.high
    return hits / trials


def test_paired_intervals_cover_the_truth_for_accuracy() -> None:
    """Two models that agree on most images: right together 60 %, reference only 8 %, other only 5 %."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        kind = rng.choice(4, 400, p=[0.6, 0.08, 0.05, 0.27])
        counts = Resampling.draw(400, rng, 400, 1).counts
        reference, other = evaluate_on([mean_of(kind <= 1), mean_of((kind == 0) | (kind == 2))], counts)
        return other - reference

    assert 0.92 <= coverage(400, draw, -0.03, percentile) <= 0.975  # 95 % +- 2.75 standard errors


def test_paired_intervals_cover_the_truth_for_ece() -> None:
    """Confidences in three bins, both overconfident, the other more so; the truth is known per bin."""
    gaps = np.array([0.06, 0.10, 0.12]), np.array([0.10, 0.16, 0.15])
    centres, share = np.array([0.5, 0.7, 0.9]), np.array([0.3, 0.3, 0.4])
    truth = float(share @ (gaps[1] - gaps[0]))

    def draw(rng: np.random.Generator) -> np.ndarray:
        bins, luck = rng.choice(3, 400, p=share), rng.random(400)
        counts = Resampling.draw(400, rng, 400, 100).counts
        models = [ece_statistic(centres[bins] - (luck < (centres - gap)[bins]), bins, 3) for gap in gaps]
        reference, other = evaluate_on(models, counts)
        return other - reference

    assert 0.92 <= coverage(400, draw, truth, bca) <= 0.975


def test_paired_intervals_cover_the_truth_for_auroc() -> None:
    """Binormal scores that share noise: AUROC = Phi(shift / sqrt 2)."""
    phi = scipy.stats.norm.cdf
    truth = float(phi(0.8 / math.sqrt(2)) - phi(1.0 / math.sqrt(2)))

    def draw(rng: np.random.Generator) -> np.ndarray:
        base = rng.normal(size=450)
        own = 0.6 * base[None] + 0.8 * rng.normal(size=(2, 450))
        counts = Resampling.draw(250, rng, 400).bootstrap(), Resampling.draw(200, rng, 400).bootstrap()
        aurocs = [
            auroc(scores[:250] + shift, scores[250:], *(c.T for c in counts))
            for scores, shift in zip(own, (1.0, 0.8), strict=True)
        ]
        return aurocs[1] - aurocs[0]

    assert 0.92 <= coverage(300, draw, truth, percentile) <= 0.98
