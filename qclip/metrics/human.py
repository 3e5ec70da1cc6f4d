"""How near predictions are to those of people: many of them were asked about each image."""

from __future__ import annotations

import numpy as np

from .arrays import Array, finite, ratio, softmax_and_log_sum
from .record import Metric
from .resampled import Statistic, Sums

HUMAN_NLL = Metric("human_nll", "NLL, human labels", -1)
ENTROPY_CORRELATION = Metric("entropy_correlation", "Correlation of entropies", 1, digits=3, signed=True)


def cross_entropy(logits: Array, shares: Array) -> Array:
    """-sum_k h_k log p_k of each image, `[n]`; logits and shares h `[n, K]`, which sum to 1."""
    return softmax_and_log_sum(finite(logits, "logits", 2))[1] - np.sum(shares * logits, axis=1)


def entropy(shares: Array) -> Array:
    """-sum_k h_k log h_k, 0 log 0 = 0, in nats."""
    return -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=1)


def correlation(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Pearson's, NaN where one of the two is constant."""
    x, y = (np.asarray(v, np.float64) - np.mean(v) for v in (x, y))  # no digits are lost to a common offset

    def combine(*sums: np.ndarray) -> np.ndarray:
        n, a, b, aa, bb, ab = (s[0] for s in sums)
        spread = np.maximum(n * aa - a * a, 0) * np.maximum(n * bb - b * b, 0)
        constant = spread <= 1e-24 * (n * aa) * (n * bb)
        return np.where(constant, np.nan, ratio(n * ab - a * b, np.sqrt(spread)))

    return Statistic([Sums(v) for v in (np.ones(len(x)), x, y, x * x, y * y, x * y)], combine)
