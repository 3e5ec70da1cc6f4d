"""Accuracy: how often the label is the answer, or among the first."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qclip.errors import InputError

from .arrays import Array, Weights, ratio, with_labels
from .record import Metric
from .resampled import Statistic, Sums, mean_of


def ranks(values: Array, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Classes that come before the label `[n]`; among equals the lowest class comes first, as argmax has it."""
    own = values[np.arange(len(values)), labels][:, None]
    rank = np.count_nonzero(values > own, axis=1)
    tied = np.flatnonzero(np.count_nonzero(values == own, axis=1) > 1)
    earlier = np.arange(values.shape[1]) < labels[tied, None]
    rank[tied] += ((values[tied] == own[tied]) & earlier).sum(1)
    return rank


def top_k(rank: np.ndarray, k: int) -> Statistic:
    """Share of samples whose label is among the first k, from `ranks`."""
    return mean_of(rank < k)


def balanced(right: np.ndarray, labels: np.ndarray, classes: int) -> Statistic:
    """Mean recall over the classes that a resample holds."""

    def combine(hits: np.ndarray, present: np.ndarray) -> np.ndarray:
        there = present > 0
        return ratio(np.where(there, ratio(hits, present), 0).sum(0), there.sum(0))

    right = np.asarray(right, np.float64)
    return Statistic([Sums(right, labels, classes), Sums(np.ones(len(right)), labels, classes)], combine)


TOP1 = Metric("top1", "Top-1 accuracy", 1, "share", 1, of=lambda o: top_k(o.rank, 1))
TOP5 = Metric("top5", "Top-5 accuracy", 1, "share", 1, of=lambda o: top_k(o.rank, 5), classes=5)
BALANCED_ACCURACY = Metric(
    "balanced_accuracy", "Balanced accuracy", 1, "share", 1, of=lambda o: balanced(o.right, o.labels, o.classes)
)
WORST_GROUP_TOP1 = Metric("worst_group_top1", "Worst group's top-1", 1, "share", 1)
GROUP_GAP = Metric("group_gap", "Gap between groups", -1, "share", 1)
CHANCE_TOP1 = Metric("chance_top1", "Top-1 accuracy of guessing", 0, "share", 1)  # of no model: 1 / classes
MEAN_TOP1 = TOP1.over_severities()
ERROR_RATIO = Metric(
    "error_ratio", "Mean error over the reference's", -1, "", 3
)  # under a corruption or a group of them


def label_ranks(logits: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """Rank of each label `[n]`, 0 = predicted; among equals the lowest class comes first, as argmax has it."""
    return ranks(*with_labels(logits, labels, "logits"))


def top_k_accuracy(logits: ArrayLike, labels: ArrayLike, k: int = 1, weights: Weights = None) -> float | Array:
    """Share of samples whose label is among the k largest of `[n, K]`. Raises InputError where k > K."""
    rank, classes = label_ranks(logits, labels), np.shape(logits)[1]
    if not 1 <= k <= classes:
        raise InputError(f"top-{k} accuracy is not defined for {classes} classes.")
    return top_k(rank, k).plain(weights)


def balanced_accuracy(logits: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean recall over the classes that occur in `labels`."""
    return balanced(label_ranks(logits, labels) == 0, np.asarray(labels), np.shape(logits)[1]).plain(weights)
