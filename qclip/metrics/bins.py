"""Bins of confidence: of equal width, and of equal mass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qclip.errors import InputError

from .arrays import Array, ratio
from .resampled import Ranked, first, running

BINS = 15
SLACK = 1e-9  # of a bin's weight, where weights are no whole numbers


def bin_of(confidence: Array, bins: int = BINS) -> NDArray[np.int64]:
    """Bins ((b-1)/bins, b/bins]; the first also holds 0. By the edges themselves: ceil(bins * c) rounds (Guo 2017)."""
    if bins < 1:
        raise InputError(f"{bins} bins are impossible; take at least one.")
    return np.clip(np.searchsorted(np.arange(bins + 1) / bins, confidence, "left") - 1, 0, bins - 1)


@dataclasses.dataclass(frozen=True)
class Bins:
    """A reliability diagram: `count`, `accuracy`, `confidence` of each bin `[bins]` (nan where empty)."""

    edges: Array
    count: Array
    accuracy: Array
    confidence: Array


def diagram(confidence: Array, right: np.ndarray, bins: int = BINS, counts: Array | None = None) -> Bins:
    """The diagram of samples `[n]`, each counted `counts` `[n]` times."""
    where, weight = bin_of(confidence, bins), np.ones(len(confidence)) if counts is None else counts
    count, hits, sure = (np.bincount(where, weight * v, bins).astype(float) for v in (1.0, right, confidence))
    return Bins(np.arange(bins + 1) / bins, count, ratio(hits, count), ratio(sure, count))


def equal_mass(confidence: Array, values: list[np.ndarray], combine: Callable[..., Array], bins: int = BINS) -> Ranked:
    """Bins of equal weight, found again in each resample; the first ones hold one sample more where it does not divide.

    An edge that falls into a run of equal confidences moves to its end; what is empty then adds nothing. `combine`
    takes the weight of each bin and the sums of `values` `[bins, resamples]`.
    """
    if bins < 1:
        raise InputError(f"{bins} bins are impossible; take at least one.")

    def binned(weight: np.ndarray, *sums: np.ndarray) -> Array:
        total = running(weight)
        columns = np.arange(weight.shape[1])
        share = np.floor(total[-1] / bins)
        rest = total[-1] - share * bins
        ends = np.zeros((bins + 1, len(columns)), np.int64)
        for b in range(1, bins):
            wanted = (b * share + np.minimum(b, rest)) * (1 - SLACK)
            ends[b] = np.where(wanted > 0, first(functools.partial(np.less_equal, wanted), total) + 1, 0)
        ends[bins] = len(weight)
        return combine(*(np.diff(each[ends, columns], axis=0) for each in (total, *(running(s) for s in sums))))

    return Ranked(confidence, values, binned)
