"""A metric as a function of weighted sums: one definition for a sample, a bootstrap replicate and a jackknife.

A resample is a column of counts, one per sample. What most metrics need of it are sums (`Statistic`), so that a
thousand resamples are one matrix product; what is read off an order (`Ranked`) needs running sums. The sample itself is
the column of ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from qclip.errors import InputError

from .arrays import Array, Weights, counts_of, ratio

DENSE_BUCKETS = 64  # up to here one-hot columns and a matrix product beat sorting and adding runs
BLOCK = 128  # resamples at a time: the temporary arrays stay in the cache
COLUMNS = 64 << 20  # bytes of one-hot columns at a time


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of `values` (float64 `[n]`) within `buckets` (int `[n]`, 0 <= bucket < size); or, without buckets, of each
    column of `values` `[n, size]`.

    rows: the sample of each value, where there are other than one per sample.
    """

    values: np.ndarray
    buckets: np.ndarray | None = None
    size: int = 1
    rows: np.ndarray | None = None

    def within(self, mask: np.ndarray) -> Sums:
        """The same of the samples in `mask` (bool `[n]`)."""
        mine = mask if self.rows is None else mask[self.rows]
        mine = mine[:, None] if self.values.ndim == 2 else mine
        return dataclasses.replace(self, values=np.where(mine, self.values, 0.0))

    @property
    def dense(self) -> bool:
        return self.rows is None and (self.size <= DENSE_BUCKETS or self.values.ndim == 2)


@dataclasses.dataclass(frozen=True)
class Statistic:
    """`combine` takes one array `[size, resamples]` for each of `sums` and returns `[resamples]`, NaN where the metric
    is undefined."""

    sums: Sequence[Sums]
    combine: Callable[..., np.ndarray]

    def within(self, mask: np.ndarray) -> Statistic:
        """The same on the rows in `mask` (bool `[n]`)."""
        return Statistic([part.within(mask) for part in self.sums], self.combine)

    def on(self, counts: np.ndarray) -> Array:
        """float64 `[resamples]` for counts `[n, resamples]`."""
        return evaluate_on([self], counts)[0]

    def plain(self, weights: Weights = None) -> float | Array:
        """One float, or `[B]` for weights `[B, n]`."""
        n = next((len(part.values) for part in self.sums if part.rows is None), 0)
        return plain(self, n, weights)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A number that is known of the whole sample only: NaN on any other resample."""

    value: float

    def within(self, mask: np.ndarray) -> Fixed:
        """NaN of anything but the whole."""
        return self if mask.all() else Fixed(np.nan)

    def on(self, counts: np.ndarray) -> Array:
        """The value where every sample counts once."""
        return np.where((counts == 1).all(0), self.value, np.nan)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Samples in ascending order of `key` `[n]`; equal keys form a run, which is never taken apart.

    combine: takes the weight of each run `[runs, resamples]` and, for each of `values` (`[n]`), its weighted sum in
    each run; returns `[resamples]`. whole: weights must be whole numbers.
    """

    key: Array
    values: Sequence[np.ndarray]
    combine: Callable[..., np.ndarray]
    whole: bool = False
    mask: np.ndarray | None = None

    def within(self, mask: np.ndarray) -> Ranked:
        """The same on the rows in `mask` (bool `[n]`)."""
        return dataclasses.replace(self, mask=mask if self.mask is None else mask & self.mask)

    def on(self, counts: np.ndarray) -> Array:
        """float64 `[resamples]` for counts `[n, resamples]`."""
        if self.whole and not np.issubdtype(counts.dtype, np.integer) and (counts != np.rint(counts)).any():
            raise InputError("this metric counts samples: its weights must be whole numbers.")
        kept = np.arange(len(self.key)) if self.mask is None else np.flatnonzero(self.mask)
        out = np.full(counts.shape[1], np.nan)
        if not len(kept):
            return out
        order = kept[np.argsort(self.key[kept], kind="stable")]
        starts = np.flatnonzero(np.concatenate([[True], np.diff(self.key[order]) != 0]))
        values = [np.asarray(each, np.float64)[order, None] for each in self.values]
        for start in range(0, counts.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            weight = counts[order, part].astype(np.float64)
            runs = [weight, *(weight * each for each in values)]
            if len(starts) < len(order):
                runs = [np.add.reduceat(each, starts, axis=0) for each in runs]
            out[part] = self.combine(*runs)
        return out

    def plain(self, weights: Weights = None) -> float | Array:
        """One float, or `[B]` for weights `[B, n]`."""
        return plain(self, len(self.key), weights)


Resampled = Statistic | Ranked | Fixed


def plain(statistic: Resampled, n: int, weights: Weights) -> float | Array:
    """One float, or `[B]` for weights `[B, n]`."""
    counts, single = counts_of(weights, n)
    values = statistic.on(counts)
    return float(values[0]) if single else values


def mean_of(values: np.ndarray) -> Statistic:
    """The mean of `values` `[n]`."""
    values = np.asarray(values, np.float64)
    return Statistic([Sums(values), Sums(np.ones(len(values)))], lambda total, n: ratio(total[0], n[0]))


def running(weights: np.ndarray) -> np.ndarray:
    """Row k: the sum of the first k rows, `[n + 1, R]`."""
    whole = np.issubdtype(weights.dtype, np.integer)
    out = np.zeros((len(weights) + 1, weights.shape[1]), np.int32 if whole else np.float64)
    np.cumsum(weights, axis=0, out=out[1:])
    return out


def first(reached: Callable[[np.ndarray], np.ndarray], sums: np.ndarray) -> np.ndarray:
    """For each column of `running` sums `[n + 1, R]`, the first row of its weights by whose own weight `reached`
    holds; the last where none does."""
    columns = np.arange(sums.shape[1])
    low, high = np.zeros(sums.shape[1], np.int64), np.full(sums.shape[1], len(sums) - 2)
    while np.any(low < high):
        middle = (low + high) // 2
        there = reached(sums[middle + 1, columns])
        high = np.where(there, middle, high)
        low = np.where(there, low, middle + 1)
    return low


def evaluate_on(statistics: Sequence[Resampled], counts: np.ndarray) -> list[np.ndarray]:
    """Each statistic on each resample: float64 `[resamples]` for counts `[n, resamples]`."""
    parts = [part for statistic in statistics if isinstance(statistic, Statistic) for part in statistic.sums]
    by_part = sums_on(parts, counts)
    out, at = [], 0
    for statistic in statistics:
        if isinstance(statistic, Statistic):
            out.append(statistic.combine(*by_part[at : at + len(statistic.sums)]))
            at += len(statistic.sums)
        else:
            out.append(statistic.on(counts))
    return out


def sums_on(parts: Sequence[Sums], counts: np.ndarray) -> list[np.ndarray]:
    """Each part's sums on each resample: float64 `[size, resamples]`."""
    if counts.shape[1] == 1:
        return [_single(part, counts[:, 0].astype(np.float64)) for part in parts]
    out: list[np.ndarray] = [np.empty(0)] * len(parts)
    group: list[int] = []
    most = max(1, COLUMNS // (8 * max(1, len(counts))))
    for i, part in enumerate(parts):
        if not part.dense:
            out[i] = _sparse(part, counts)
            continue
        if group and sum(parts[j].size for j in group) + part.size > most:
            _dense(parts, group, counts, out)
            group = []
        group.append(i)
    _dense(parts, group, counts, out)
    return out


def _single(part: Sums, weight: np.ndarray) -> np.ndarray:
    if part.values.ndim == 2:
        return (weight @ part.values)[:, None]
    weighted = part.values * (weight if part.rows is None else weight[part.rows])
    if part.buckets is None:
        return np.array([[weighted.sum()]])
    return np.bincount(part.buckets, weighted, part.size)[:, None]


def _dense(parts: Sequence[Sums], group: Sequence[int], counts: np.ndarray, out: list[np.ndarray]) -> None:
    """The sums of all parts in `group` by one product with one-hot columns."""
    columns = np.zeros((len(counts), sum(parts[i].size for i in group)))
    rows, at = np.arange(len(counts)), 0
    for i in group:
        part = parts[i]
        if part.values.ndim == 2:
            columns[:, at : at + part.size] = part.values
        else:
            columns[rows, at + (0 if part.buckets is None else part.buckets)] = part.values
        at += part.size
    sums = np.empty((columns.shape[1], counts.shape[1]))
    for start in range(0, counts.shape[1], BLOCK):
        sums[:, start : start + BLOCK] = columns.T @ counts[:, start : start + BLOCK].astype(np.float64)
    at = 0
    for i in group:
        out[i] = sums[at : at + parts[i].size]
        at += parts[i].size


def _sparse(part: Sums, counts: np.ndarray) -> np.ndarray:
    buckets = np.zeros(len(part.values), np.int64) if part.buckets is None else part.buckets
    order = np.argsort(buckets, kind="stable")
    rows = order if part.rows is None else part.rows[order]
    present, starts = np.unique(buckets[order], return_index=True)
    out = np.zeros((part.size, counts.shape[1]))
    if not len(present):
        return out
    for start in range(0, counts.shape[1], BLOCK):
        block = counts[rows, start : start + BLOCK] * part.values[order, None]
        out[present, start : start + BLOCK] = np.add.reduceat(block, starts, axis=0)
    return out
