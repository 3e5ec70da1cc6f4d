"""A metric as a function of weighted sums: one definition for a sample, a bootstrap replicate and a jackknife.

A resample is a column of counts, one per sample. What all metrics need of it are sums, so that a thousand resamples
are one matrix product. The sample itself is the column of ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from .arrays import Array, Weights, counts_of, ratio

DENSE_BUCKETS = 64  # up to here one-hot columns and a matrix product beat sorting and adding runs
BLOCK = 128  # resamples at a time: the temporary arrays stay in the cache


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums of `values` (float64 `[n]`) within `buckets` (int `[n]`, 0 <= bucket < size)."""

    values: np.ndarray
    buckets: np.ndarray | None = None
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Statistic:
    """`combine` takes one array `[size, resamples]` for each of `sums` and returns `[resamples]`, NaN where the metric
    is undefined."""

    sums: Sequence[Sums]
    combine: Callable[..., np.ndarray]

    def within(self, mask: np.ndarray) -> Statistic:
        """The same on the rows in `mask` (bool `[n]`)."""
        parts = [dataclasses.replace(part, values=np.where(mask, part.values, 0.0)) for part in self.sums]
        return Statistic(parts, self.combine)

    def on(self, counts: np.ndarray) -> Array:
        """float64 `[resamples]` for counts `[n, resamples]`."""
        return evaluate_on([self], counts)[0]

    def plain(self, weights: Weights = None) -> float | Array:
        """One float, or `[B]` for weights `[B, n]`."""
        counts, single = counts_of(weights, len(self.sums[0].values))
        values = self.on(counts)
        return float(values[0]) if single else values


def mean_of(values: np.ndarray) -> Statistic:
    """The mean of `values` `[n]`."""
    values = np.asarray(values, np.float64)
    return Statistic([Sums(values), Sums(np.ones(len(values)))], lambda total, n: ratio(total[0], n[0]))


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
