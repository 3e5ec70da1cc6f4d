"""Calibration: whether confidence is what it says. Confidence is the largest softmax probability."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qclip.errors import InputError

from .arrays import Array, Weights, counts_of, ratio, softmax_and_log_sum, with_labels
from .record import Metric
from .resampled import Statistic, Sums, mean_of

BINS = 15


# -- definitions, from values of each sample ---------------------------------------------------------------------------


def bin_of(confidence: Array, bins: int = BINS) -> NDArray[np.int64]:
    """Bins ((b-1)/bins, b/bins]; the first also holds 0. By the edges themselves: ceil(bins * c) rounds (Guo 2017)."""
    if bins < 1:
        raise InputError(f"{bins} bins are impossible; take at least one.")
    return np.clip(np.searchsorted(np.arange(bins + 1) / bins, confidence, "left") - 1, 0, bins - 1)


def calibration_error(
    confidence: Array, right: np.ndarray, bins: int = BINS, norm: Literal["l1", "l2", "max"] = "l1"
) -> Statistic:
    """(sum_b n_b/n |acc_b - conf_b|^p)^(1/p); `max` is the largest over non-empty bins."""
    where, ones = bin_of(confidence, bins), np.ones(len(confidence))
    gaps = Sums(confidence - right, where, bins)
    if norm == "l1":
        return Statistic([gaps, Sums(ones)], lambda gap, n: ratio(np.abs(gap).sum(0), n[0]))
    if norm not in ("l2", "max"):
        raise InputError(f"unknown norm {norm!r}; known: l1, l2, max.")

    def combine(gap: np.ndarray, n: np.ndarray) -> np.ndarray:
        share = np.where(n > 0, ratio(np.abs(gap), n), 0)
        if norm == "l2":
            return np.sqrt(ratio((share * np.abs(gap)).sum(0), n.sum(0)))
        return np.where(n.sum(0) > 0, share.max(0), np.nan)

    return Statistic([gaps, Sums(ones, where, bins)], combine)


def negative_log_likelihood(logits: Array, log_sum: Array, labels: np.ndarray) -> Array:
    """Of each sample `[n]`, in nats, from its logits and their log sum exp."""
    return log_sum - logits[np.arange(len(labels)), labels]


def squared_error(probs: Array, labels: np.ndarray) -> Array:
    """sum_k (p_k - 1[y = k])^2 of each sample `[n]`."""
    return (probs**2).sum(1) - 2 * probs[np.arange(len(labels)), labels] + 1


ECE = Metric("ece", "ECE", -1, "share", 1, interval="bca", of=lambda o: calibration_error(o.confidence, o.right))
ECE_TS = Metric(
    "ece_ts",
    "ECE, temperature fitted",
    -1,
    "share",
    1,
    interval="bca",
    of=lambda o: None if np.isnan(o.confidence_ts).any() else calibration_error(o.confidence_ts, o.right),
)
NLL = Metric("nll", "NLL", -1, digits=3, of=lambda o: mean_of(o.nll))
BRIER = Metric("brier", "Brier score", -1, digits=3, of=lambda o: mean_of(o.brier))
SIGNED_GAP = Metric("signed_gap", "Signed gap", 0, "share", 1, True, of=lambda o: mean_of(o.confidence - o.right))
MEAN_CONFIDENCE = Metric("mean_confidence", "Mean confidence", 0, "share", 1, of=lambda o: mean_of(o.confidence))
TEMPERATURE = Metric("temperature", "Temperature", 0, digits=2)
MEAN_ECE = ECE.over_severities()
MEAN_NLL = NLL.over_severities()


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


# -- plain functions ---------------------------------------------------------------------------------------------------


def _confidence(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array, int]:
    p, y = with_labels(probs, labels, "probs")
    return p.max(1), (p.argmax(1) == y).astype(np.float64), p.shape[1]


def _beyond_one_class(statistic: Statistic, classes: int, weights: Weights) -> float | Array:
    """With one class every sample is right and sure: there is nothing to calibrate."""
    value = statistic.plain(weights)
    return value if classes > 1 else value * np.nan


def reliability_bins(probs: ArrayLike, labels: ArrayLike, bins: int = BINS, weights: Weights = None) -> Bins:
    """Equal-width bins of the confidence (largest probability). `weights` at most `[n]`."""
    confidence, hit, _ = _confidence(probs, labels)
    counts, single = counts_of(weights, len(hit))
    if not single:
        raise InputError("reliability_bins takes one set of weights, not several replicates.")
    return diagram(confidence, hit, bins, counts[:, 0])


def ece(
    probs: ArrayLike,
    labels: ArrayLike,
    bins: int = BINS,
    norm: Literal["l1", "l2", "max"] = "l1",
    weights: Weights = None,
) -> float | Array:
    """Expected calibration error, (sum_b n_b/n |acc_b - conf_b|^p)^(1/p); `max` is the largest over non-empty bins."""
    confidence, hit, classes = _confidence(probs, labels)
    return _beyond_one_class(calibration_error(confidence, hit, bins, norm), classes, weights)


def mean_confidence(probs: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean of the largest probability."""
    p, _ = with_labels(probs, np.zeros(len(np.asarray(probs)), np.int64), "probs")
    return mean_of(p.max(1)).plain(weights)


def signed_gap(probs: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean confidence minus accuracy: positive is overconfident. Its size never exceeds the ECE."""
    confidence, hit, classes = _confidence(probs, labels)
    return _beyond_one_class(mean_of(confidence - hit), classes, weights)


def nll(logits: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean negative log-likelihood (nats) of softmax(logits)."""
    z, y = with_labels(logits, labels, "logits")
    losses = negative_log_likelihood(z, softmax_and_log_sum(z)[1], y)
    return _beyond_one_class(mean_of(losses), z.shape[1], weights)


def brier(probs: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean of sum_k (p_k - 1[y = k])^2, in 0..2 (twice scikit-learn's binary score)."""
    p, y = with_labels(probs, labels, "probs")
    return _beyond_one_class(mean_of(squared_error(p, y)), p.shape[1], weights)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """`value` T (logits are divided by it); `flag` says why T is not an ordinary optimum, "" where it is."""

    value: float
    flag: str = ""

    def __float__(self) -> float:
        return self.value


def fit_temperature(logits: ArrayLike, labels: ArrayLike, weights: Weights = None) -> Temperature:
    """T that minimizes the NLL of softmax(logits / T): safeguarded Newton in 1/T, where the loss is convex.

    Flags: "constant" (nothing to fit, T = 1), "no positive optimum" (T = inf), "separable" (every label is strictly
    the largest logit: the loss has no minimum, T is the smallest that is allowed).
    """
    z, y = with_labels(logits, labels, "logits")
    counts, single = counts_of(weights, len(y))
    if not single:
        raise InputError("fit_temperature takes one set of weights, not several replicates.")
    w = counts[:, 0]
    if not w.sum() > 0:
        raise InputError("all weights are zero: there is nothing to fit a temperature to.")
    w = w / w.sum()
    z = z[w > 0] - z[w > 0].max(1, keepdims=True)
    y, w = y[w > 0], w[w > 0]
    own = z[np.arange(len(y)), y]
    if z.shape[1] == 1 or not (z < 0).any():
        return Temperature(1.0, "constant")

    def slopes(beta: float) -> tuple[float, float]:
        p = np.exp(beta * z)
        p /= p.sum(1, keepdims=True)
        mean = (p * z).sum(1)
        return float(w @ (mean - own)), float(w @ ((p * z**2).sum(1) - mean**2))

    if slopes(0.0)[0] >= 0:
        return Temperature(float("inf"), "no positive optimum")
    cap = 1e4 / float(z.std())
    if ((z >= own[:, None]).sum(1) == 1).all():
        return Temperature(1 / cap, "separable")
    low, high = 0.0, 1.0
    while slopes(high)[0] <= 0:
        low, high = high, 2 * high
        if high > cap:
            return Temperature(1 / cap, "separable")
    beta, enough = min(max(1.0, low), high), 1e-12 * float(np.abs(z).mean())
    for _ in range(200):  # Newton needs 4 to 10; bisection alone would need about 60
        slope, curve = slopes(beta)
        if abs(slope) <= enough:
            break
        low, high = (beta, high) if slope < 0 else (low, beta)
        step = beta - slope / curve if curve > 1e-300 else np.nan
        beta = step if low < step < high else (low + high) / 2
    return Temperature(1 / beta)
