"""Selective prediction: what is still wrong when the least sure samples are left out."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Array, Weights, finite, ratio
from .calibration import confidence_of
from .record import Metric
from .resampled import Ranked, Statistic, Sums, mean_of

Excess = Literal["", "exact", "approximate"]


def area(confidence: Array, right: np.ndarray, less: Excess = "") -> Ranked:
    """Area under the risk-coverage curve; `less` the area of the best order of as many errors.

    In a run of m equal confidences after k0 samples with E0 errors, g of them errors, the expected sum over the run
    sum_j (E0 + g j/m)/(k0 + j) is g + (E0 - g k0/m)(H(k0+m) - H(k0)), H harmonic numbers. The best order has all k
    errors last: (k - (n-k)(H(n) - H(n-k)))/n; published as r + (1-r) log(1-r), r = k/n (Geifman et al. 1805.08206).
    """

    def combine(m: Array, g: Array) -> Array:
        after, errors = np.cumsum(m, axis=0), np.cumsum(g, axis=0)
        before, n, k = after - m, after[-1], errors[-1]
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int(n.max(initial=0)) + 1))])
        share = np.divide(g, m, out=np.zeros_like(g), where=m > 0)
        steps = harmonic[after.astype(np.int64)] - harmonic[before.astype(np.int64)]
        sums = (g + (errors - g - share * before) * steps).sum(0)
        if less == "exact":
            sums = sums - (k - (n - k) * (harmonic[n.astype(np.int64)] - harmonic[(n - k).astype(np.int64)]))
        value = ratio(sums, n)
        if less == "approximate":
            kept = ratio(n - k, n)
            value = value - (1 - kept) - kept * np.log(np.where(kept > 0, kept, 1))
        return value

    return Ranked(-confidence, [1 - np.asarray(right, np.float64)], combine, whole=True)


def accepted(confidence: Array, threshold: float) -> Statistic:
    """Share of samples at or above a threshold."""
    return mean_of(confidence >= threshold)


def accepted_risk(confidence: Array, right: np.ndarray, threshold: float) -> Statistic:
    """Share of errors among the samples at or above a threshold."""
    kept = (confidence >= threshold).astype(np.float64)
    return Statistic([Sums(kept * (1 - np.asarray(right, np.float64))), Sums(kept)], lambda e, n: ratio(e[0], n[0]))


AURC = Metric("aurc", "AURC", -1, digits=4, of=lambda o: area(o.confidence, o.right))
EAURC = Metric("eaurc", "Excess AURC", -1, digits=4, of=lambda o: area(o.confidence, o.right, "exact"))
EAURC_APPROXIMATE = Metric(
    "eaurc_approximate",
    "Excess AURC, published approximation",
    -1,
    digits=4,
    of=lambda o: area(o.confidence, o.right, "approximate"),
)


def _accuracy_area(o: Any) -> Ranked:
    risk = area(o.confidence, o.right)
    return Ranked(risk.key, risk.values, lambda *sums: 1 - risk.combine(*sums), whole=True)


AURRA = Metric("aurra", "Area under accuracy-coverage", 1, digits=4, of=_accuracy_area)
COVERAGE_TRANSFERRED = Metric(
    "coverage_transferred",
    "Coverage at the reference's threshold",
    1,
    "share",
    1,
    undefined="no image is accepted",
)
RISK_TRANSFERRED = Metric(
    "risk_transferred",
    "Error rate at the reference's threshold",
    -1,
    "share",
    1,
    undefined="no image is accepted",
)


def aurc(probs: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Area under the risk-coverage curve, confidence descending; ties give the mean over all their orders. `weights`
    are whole numbers."""
    confidence, hit, _ = confidence_of(probs, labels)
    return area(confidence, hit).plain(weights)


def eaurc(probs: ArrayLike, labels: ArrayLike, approximate: bool = False, weights: Weights = None) -> float | Array:
    """AURC beyond that of the best order of as many errors: exact, at least 0; or, as published, beyond
    r + (1 - r) log(1 - r), which differs by O(1/n)."""
    confidence, hit, _ = confidence_of(probs, labels)
    return area(confidence, hit, "approximate" if approximate else "exact").plain(weights)


def aurra(probs: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Area under the accuracy-coverage curve, 1 - AURC."""
    return 1 - aurc(probs, labels, weights)


def risk_coverage(confidence: ArrayLike, right: ArrayLike) -> tuple[Array, Array, Array]:
    """Coverage, risk and threshold `[m]` at every distinct confidence, the highest first: of the samples at or above
    the threshold their share of all, and the share of errors among them."""
    c, hit = finite(confidence, "confidence", 1), np.asarray(right, np.float64)
    order = np.argsort(-c, kind="stable")
    last = np.flatnonzero(np.concatenate([np.diff(c[order]) != 0, [True]])) if len(c) else np.empty(0, np.int64)
    kept = last + 1
    return kept / max(len(c), 1), np.cumsum(1 - hit[order])[last] / kept, c[order][last]
