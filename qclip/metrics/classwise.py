"""Calibration of the probability of every class, not only of the largest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Array, Weights, ratio, with_labels
from .bins import BINS, bin_of
from .calibration import FEW, beyond_one_class
from .record import Metric
from .resampled import Fixed, Resampled, Statistic, Sums, sums_on


def classwise_error(probs: Array, labels: np.ndarray, bins: int = BINS) -> Statistic:
    """The mean over classes of the ECE of (p_k, 1[y = k]), all samples (Kull et al. 1910.12656).

    A row has fewer than `bins` probabilities beyond the first bin. These are counted; the first bin's gap is what
    remains of the class's whole gap.
    """
    classes = probs.shape[1]
    far = _entries(probs, labels, probs > 1 / bins, bins)
    whole = [Sums(probs, size=classes), Sums(np.ones(len(labels)), labels, classes)]

    def combine(mass: Array, count: Array, gaps: Array) -> Array:
        gaps = gaps.reshape(classes, bins, -1)
        nearest = mass - count - gaps.sum(1)
        return ratio((np.abs(gaps).sum(1) + np.abs(nearest)).sum(0), classes * count.sum(0))

    return Statistic([*whole, far[0]], combine)


def likely_error(probs: Array, labels: np.ndarray, bins: int = BINS) -> Statistic:
    """The same of the samples in which a class has more than its even share, p_k > 1/K: with many classes nearly all
    the rest lies in the first bin, whose gap is next to nothing. Mean over the classes that have such samples."""
    classes = probs.shape[1]

    def combine(_: Array, gaps: Array, counts: Array) -> Array:
        gaps, n = (each.reshape(classes, bins, -1) for each in (gaps, counts))
        there = n.sum(1) > 0
        each = np.where(there, ratio(np.abs(gaps).sum(1), n.sum(1)), 0)
        return ratio(each.sum(0), there.sum(0))

    samples = Sums(np.ones(len(labels)))
    return Statistic([samples, *_entries(probs, labels, probs > 1 / classes, bins)], combine)


def _entries(probs: Array, labels: np.ndarray, chosen: np.ndarray, bins: int) -> list[Sums]:
    """Gaps p_k - 1[y = k] and numbers of the chosen entries, by class and bin."""
    flat = np.flatnonzero(chosen)
    rows, columns = np.divmod(flat, probs.shape[1])
    p = probs.reshape(-1)[flat]
    buckets, size = columns * bins + bin_of(p, bins), probs.shape[1] * bins
    return [Sums(values, buckets, size, rows) for values in (p - (labels[rows] == columns), np.ones(len(rows)))]


# -- records -----------------------------------------------------------------------------------------------------------

DEFINITIONS = {"ece_classwise": classwise_error, "ece_classwise_likely": likely_error}
KEPT = 64  # classes up to which probabilities are kept, so that what is made of them can be resampled

Totals = dict[str, list[Array]]


def totals(probs: Array, labels: np.ndarray) -> Totals:
    """The sums of each definition for some rows, each counted once. They add up over the rows of a set."""
    ones = np.ones((len(labels), 1), np.uint8)
    return {name: sums_on(of(probs, labels).sums, ones) for name, of in DEFINITIONS.items()}


def added(parts: Sequence[Totals]) -> Totals:
    """The sums of several parts of a set."""
    if not all(parts):
        return {}
    return {name: [np.sum(each, axis=0) for each in zip(*(p[name] for p in parts), strict=True)] for name in parts[0]}


def _from(o: Any, name: str) -> Resampled | None:
    """With all probabilities at hand a statistic, else its value on the whole set."""
    if o.probs is not None:
        return DEFINITIONS[name](o.probs, o.labels)
    if name not in o.totals:
        return None
    empty = DEFINITIONS[name](np.zeros((0, o.classes)), np.zeros(0, np.int64))
    return Fixed(float(empty.combine(*o.totals[name])[0]))


ECE_CLASSWISE = Metric(
    "ece_classwise",
    "Classwise ECE",
    -1,
    "share",
    2,
    interval="bca",
    of=lambda o: _from(o, "ece_classwise"),
    classes=2,
    undefined=FEW,
)
ECE_CLASSWISE_LIKELY = Metric(
    "ece_classwise_likely",
    "Classwise ECE where p > 1/K",
    -1,
    "share",
    2,
    interval="bca",
    of=lambda o: _from(o, "ece_classwise_likely"),
    classes=2,
    undefined=FEW,
)


def classwise_ece(
    probs: ArrayLike, labels: ArrayLike, bins: int = BINS, likely: bool = False, weights: Weights = None
) -> float | Array:
    """Mean over classes of the ECE of (p_k, 1[y = k]); with `likely` only of the samples with p_k > 1/K."""
    p, y = with_labels(probs, labels, "probs")
    return beyond_one_class((likely_error if likely else classwise_error)(p, y, bins), p.shape[1], weights)
