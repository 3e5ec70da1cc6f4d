"""A sigmoid on each pair of an image and a class (SigLIP, Zhai et al. 2303.15343): how well it is calibrated.

The probabilities of an image's classes do not sum to 1: each is that of "this image and this text belong together".
"""

from __future__ import annotations

import numpy as np

from .arrays import Array, ratio
from .bins import bin_of
from .record import Metric
from .resampled import Statistic, Sums

BINS = 15

PAIR_ECE = Metric("pair_ece", "ECE of pairs", -1, "share", 2, interval="bca")
PAIR_NLL = Metric("pair_nll", "NLL of pairs", -1)


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-z)), without overflow."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1, small) / (1 + small)  # type: ignore[no-any-return]


def pair_losses(logits: Array, labels: np.ndarray) -> Array:
    """Mean over classes of the binary cross-entropy of each pair, `[n]`; logits `[n, K]`."""
    match = np.arange(logits.shape[1]) == labels[:, None]
    return np.mean(np.logaddexp(0, np.where(match, -logits, logits)), axis=1)


def pair_bins(logits: Array, labels: np.ndarray) -> Array:
    """For each image how many of its pairs lie in each bin, the sum of their probabilities, and how many match:
    `[n, 3, BINS]`."""
    n, classes = logits.shape
    p = sigmoid(logits)
    match = np.arange(classes) == labels[:, None]
    where = (bin_of(p.ravel()) + BINS * np.repeat(np.arange(n), classes)).astype(np.int64)
    sums = [np.bincount(where, values, n * BINS).reshape(n, BINS) for values in (None, p.ravel(), match.ravel())]
    return np.stack([s.astype(np.float64) for s in sums], axis=1)


def pair_ece(bins: Array) -> Statistic:
    """sum_b n_b/n |share that matches - mean probability| over all pairs, of `pair_bins`."""

    def combine(*sums: np.ndarray) -> Array:
        count, sure, matched = sums
        return ratio(np.abs(matched - sure).sum(0), count.sum(0))

    return Statistic([Sums(bins[:, part], size=BINS) for part in range(3)], combine)
