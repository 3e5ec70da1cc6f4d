"""Paired statistics: one count matrix per data set, shared by every model and metric.

A resample is a vector of counts, one per sample. Every metric that is a function of weighted sums is then a matrix
product, and the difference between two models is taken inside the resample: what both models find hard cancels.
"""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import numpy as np

from qclip.errors import InputError
from qclip.metrics.resampled import BLOCK

LEVEL = 0.95
BLOCKS = 200  # of the jackknife


@dataclasses.dataclass(frozen=True)
class Resampling:
    """Counts `[n, 1 + replicates + blocks]` of one data set: column 0 is the sample as it is (all ones), then the
    multinomial bootstrap replicates, then the delete-one-block jackknife that BCa takes its acceleration from."""

    counts: np.ndarray  # uint16
    replicates: int

    @classmethod
    def draw(cls, n: int, generator: np.random.Generator, replicates: int = 1000, blocks: int = BLOCKS) -> Resampling:
        """Raises InputError where there is nothing to resample."""
        if n < 1 or replicates < 1:
            raise InputError(f"cannot resample {n} samples {replicates} times; both must be at least 1")
        blocks = min(blocks, n)
        counts = np.ones((n, 1 + replicates + blocks), np.uint16)
        for start in range(0, replicates, BLOCK):  # transposed in blocks: a column at a time would thrash the cache
            stop = min(replicates, start + BLOCK)
            rows = [np.bincount(generator.integers(0, n, n), minlength=n) for _ in range(start, stop)]
            counts[:, 1 + start : 1 + stop] = np.asarray(rows, np.uint16).T
        counts[np.arange(n), 1 + replicates + generator.permutation(n) % blocks] = 0
        return cls(counts, replicates)

    def bootstrap(self) -> np.ndarray:
        """Column 0 and the replicates, without the jackknife: uint16 `[n, 1 + replicates]`."""
        return self.counts[:, : 1 + self.replicates]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; all NaN where it is undefined."""

    value: float
    low: float
    high: float


def percentile(resampled: np.ndarray, replicates: int, level: float = LEVEL) -> Estimate:
    """The percentile interval from `[value, replicates ...]`. Resamples in which it is undefined are left out."""
    drawn = _drawn(resampled, replicates)
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (math.nan, math.nan)
    return Estimate(float(resampled[0]), float(low), float(high))


def bca(resampled: np.ndarray, replicates: int, level: float = LEVEL) -> Estimate:
    """The bias-corrected and accelerated interval (Efron 1987) from `[value, replicates ..., jackknife ...]`.

    z0 comes from the share of replicates below the value, equals counted half; the acceleration from the jackknife.
    """
    value, drawn = float(resampled[0]), _drawn(resampled, replicates)
    jackknife = resampled[1 + replicates :]
    if not len(drawn) or math.isnan(value):
        return Estimate(value, math.nan, math.nan)
    normal = NormalDist()
    below = (np.sum(drawn < value) + 0.5 * np.sum(drawn == value)) / len(drawn)
    edge = 0.5 / len(drawn)  # the share cannot be resolved below this, and 0 would put z0 at infinity
    z0 = normal.inv_cdf(min(max(below, edge), 1 - edge))
    pull = np.mean(jackknife) - jackknife
    power = float(np.sum(pull**2)) ** 1.5
    acceleration = float(np.sum(pull**3)) / (6 * power) if power > 0 and math.isfinite(power) else 0.0
    ends = []
    for z in (normal.inv_cdf((1 - level) / 2), normal.inv_cdf((1 + level) / 2)):
        stretch = max(1 - acceleration * (z0 + z), 1e-3)  # past its pole the formula turns round
        ends.append(normal.cdf(z0 + (z0 + z) / stretch))
    low, high = np.quantile(drawn, ends)
    return Estimate(value, float(low), float(high))


def _drawn(resampled: np.ndarray, replicates: int) -> np.ndarray:
    drawn = resampled[1 : 1 + replicates]
    return drawn[~np.isnan(drawn)]


INTERVALS = {"percentile": percentile, "bca": bca}  # by a metric's `interval`
