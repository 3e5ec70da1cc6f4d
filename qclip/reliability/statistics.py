"""Paired statistics: one count matrix per data set, shared by every model and metric.

A resample is a vector of counts, one a sample. Every metric that is a function of weighted sums is then a matrix
product, and the difference between two models is taken inside the resample: what both models find hard cancels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from qclip.errors import InputError

DENSE_BUCKETS = 64  # up to here one-hot columns and a matrix product beat sorting and adding runs
BLOCK = 128  # resamples at a time: the temporary arrays stay in the cache


def seeded(seed: int, name: str) -> np.random.Generator:
    """A generator for (seed, name), independent between names."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


@dataclasses.dataclass(frozen=True)
class Resampling:
    """Counts `[n, 1 + replicates + blocks]` of one data set: column 0 is the sample as it is (all ones), then the
    multinomial bootstrap replicates, then the delete-one-block jackknife that BCa takes its acceleration from."""

    counts: np.ndarray  # uint16
    replicates: int

    @classmethod
    def draw(cls, n: int, generator: np.random.Generator, replicates: int = 1000, blocks: int = 200) -> Resampling:
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
class Sums:
    """Sums of `values` (float64 `[n]`) within `buckets` (int `[n]`, 0 <= bucket < size)."""

    values: np.ndarray
    buckets: np.ndarray | None = None
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A metric as a function of weighted sums. `combine` takes one array `[size, resamples]` for each of `sums` and
    returns `[resamples]`. `skewed` statistics (ECE: the bootstrap adds its bias again) get BCa intervals."""

    sums: Sequence[Sums]
    combine: Callable[..., np.ndarray]
    skewed: bool = False


def mean_of(values: np.ndarray, mask: np.ndarray | None = None) -> Statistic:
    """The mean of `values` `[n]`, over the rows in `mask` (bool `[n]`)."""
    values = np.asarray(values, np.float64)
    mask = np.ones(len(values), bool) if mask is None else mask
    return Statistic([Sums(np.where(mask, values, 0.0)), Sums(mask.astype(np.float64))], lambda v, n: ratio(v[0], n[0]))


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b != 0)


def evaluate_on(statistics: Sequence[Statistic], counts: np.ndarray) -> list[np.ndarray]:
    """Each statistic on each resample: float64 `[resamples]` for counts `[n, resamples]`."""
    parts = [part for statistic in statistics for part in statistic.sums]
    dense = [part for part in parts if part.size <= DENSE_BUCKETS]
    columns = np.zeros((len(counts), sum(part.size for part in dense)))
    rows, at = np.arange(len(counts)), 0
    for part in dense:
        columns[rows, at + (0 if part.buckets is None else part.buckets)] = part.values
        at += part.size
    sums = np.empty((columns.shape[1], counts.shape[1]))
    for start in range(0, counts.shape[1], BLOCK):
        sums[:, start : start + BLOCK] = columns.T @ counts[:, start : start + BLOCK].astype(np.float64)
    splits = iter(np.split(sums, np.cumsum([part.size for part in dense])[:-1]) if dense else [])
    by_part = [next(splits) if part.size <= DENSE_BUCKETS else _sparse_sums(part, counts) for part in parts]
    out, at = [], 0
    for statistic in statistics:
        out.append(statistic.combine(*by_part[at : at + len(statistic.sums)]))
        at += len(statistic.sums)
    return out


def _sparse_sums(part: Sums, counts: np.ndarray) -> np.ndarray:
    assert part.buckets is not None
    order = np.argsort(part.buckets, kind="stable")
    present, starts = np.unique(part.buckets[order], return_index=True)
    out = np.zeros((part.size, counts.shape[1]))
    for start in range(0, counts.shape[1], BLOCK):
        block = counts[order, start : start + BLOCK] * part.values[order, None]
        out[present, start : start + BLOCK] = np.add.reduceat(block, starts, axis=0)
    return out


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; all NaN where it is undefined."""

    value: float
    low: float
    high: float


def percentile(resampled: np.ndarray, replicates: int, level: float = 0.95) -> Estimate:
    """The percentile interval from `[value, replicates ...]`. Resamples in which it is undefined are left out."""
    drawn = _drawn(resampled, replicates)
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (math.nan, math.nan)
    return Estimate(float(resampled[0]), float(low), float(high))


def bca(resampled: np.ndarray, replicates: int, level: float = 0.95) -> Estimate:
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


@dataclasses.dataclass(frozen=True)
class Flips:
    """Paired right / wrong: `lost` were right in the reference only, `won` in the other only; mid-p of McNemar."""

    lost: int
    won: int
    p: float


def mcnemar(reference_right: np.ndarray, other_right: np.ndarray) -> Flips:
    """McNemar's test on bool `[n]` pairs: mid-p = 2 F(min) - f(min) of Binomial(lost + won, 1/2); 1 without flips."""
    lost = int(np.sum(reference_right & ~other_right))
    won = int(np.sum(~reference_right & other_right))
    n, least = lost + won, min(lost, won)
    if n == 0:
        return Flips(0, 0, 1.0)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(least + 1)
    ]
    chances = np.exp(logs)
    return Flips(lost, won, float(min(1.0, 2 * chances.sum() - chances[-1])))
