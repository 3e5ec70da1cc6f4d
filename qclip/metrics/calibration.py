"""Calibration: whether confidence is what it says. Confidence is the largest softmax probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from qclip.errors import InputError

from .arrays import Array, Weights, counts_of, ratio, softmax_and_log_sum, with_labels
from .bins import BINS, Bins, bin_of, diagram, equal_mass
from .record import Metric
from .resampled import Ranked, Statistic, Sums, mean_of

# -- definitions, from values of each sample ---------------------------------------------------------------------------


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
        share = _gap_of_bins(gap, n)
        if norm == "l2":
            return np.sqrt(ratio((share * np.abs(gap)).sum(0), n.sum(0)))
        return np.where(n.sum(0) > 0, share.max(0), np.nan)

    return Statistic([gaps, Sums(ones, where, bins)], combine)


def _gap_of_bins(gap: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.where(n > 0, ratio(np.abs(gap), n), 0)


def worst_bin(confidence: Array, right: np.ndarray, bins: int = BINS) -> Statistic:
    """Samples in the bin whose gap is the largest, the lowest such bin: what the maximum hangs on."""

    def combine(gap: np.ndarray, n: np.ndarray) -> np.ndarray:
        worst = np.where(n > 0, _gap_of_bins(gap, n), -1).argmax(0)
        return np.where(n.sum(0) > 0, n[worst, np.arange(n.shape[1])], np.nan)

    where = bin_of(confidence, bins)
    return Statistic([Sums(confidence - right, where, bins), Sums(np.ones(len(where)), where, bins)], combine)


def adaptive_error(confidence: Array, right: np.ndarray, bins: int = BINS) -> Ranked:
    """sum_b n_b/n |acc_b - conf_b| over bins of equal mass."""
    return equal_mass(confidence, [confidence - right], lambda n, gap: ratio(np.abs(gap).sum(0), n.sum(0)), bins)


def debiased_square(
    confidence: Array, right: np.ndarray, bins: int = BINS, binning: Literal["mass", "width"] = "mass"
) -> Statistic | Ranked:
    """sum_b n_b/n [(acc_b - conf_b)^2 - acc_b (1 - acc_b)/(n_b - 1)] over bins of two samples and more: unbiased in
    each bin, so it may be negative (Kumar et al. 1909.10155)."""

    def combine(n: np.ndarray, gap: np.ndarray, hits: np.ndarray) -> np.ndarray:
        many = n > 1
        accuracy = ratio(hits, n)
        spread = ratio(accuracy * (1 - accuracy), np.where(many, n - 1, 0))
        return ratio(np.where(many, n * (ratio(gap, n) ** 2 - spread), 0).sum(0), n.sum(0))

    if binning == "mass":
        return equal_mass(confidence, [confidence - right, right], combine, bins)
    if binning != "width":
        raise InputError(f"unknown binning {binning!r}; known: mass, width.")
    where = bin_of(confidence, bins)
    values = np.ones(len(where)), confidence - right, np.asarray(right, np.float64)
    return Statistic([Sums(each, where, bins) for each in values], combine)


def debiased_error(confidence: Array, right: np.ndarray, bins: int = BINS) -> Ranked:
    """The root of `debiased_square` over bins of equal mass, 0 where it is negative."""
    square = debiased_square(confidence, right, bins)
    assert isinstance(square, Ranked)
    inner = square.combine
    return Ranked(square.key, square.values, lambda *sums: np.sqrt(np.maximum(inner(*sums), 0)))


def one_sided(confidence: Array, right: np.ndarray, side: Literal[1, -1], bins: int = BINS) -> Statistic:
    """sum_b n_b/n max(0, side (conf_b - acc_b)): what ECE owes to overconfident (1) or underconfident bins (-1)."""
    gaps = Sums(confidence - right, bin_of(confidence, bins), bins)
    return Statistic(
        [gaps, Sums(np.ones(len(confidence)))], lambda gap, n: ratio(np.maximum(side * gap, 0).sum(0), n[0])
    )


def negative_log_likelihood(logits: Array, log_sum: Array, labels: np.ndarray) -> Array:
    """Of each sample `[n]`, in nats, from its logits and their log sum exp."""
    return log_sum - logits[np.arange(len(labels)), labels]


# -- records -----------------------------------------------------------------------------------------------------------

FEW = "no samples"


def _error(name: str, label: str, of: Callable[[Any], Any]) -> Metric:
    """A share of 0..1 whose bootstrap adds its bias again."""
    return Metric(name, label, -1, "share", 1, interval="bca", of=of, classes=2, undefined=FEW)


def _loss(name: str, label: str, of: Callable[[Any], Any]) -> Metric:
    return Metric(name, label, -1, digits=3, of=of, classes=2, undefined=FEW)


def _ece_at(name: str) -> Callable[[Any], Statistic | None]:
    return lambda o: calibration_error(o.confidence_at[name], o.right) if name in o.confidence_at else None


def _nll_at(name: str) -> Callable[[Any], Statistic | None]:
    return lambda o: mean_of(o.nll_at[name]) if name in o.nll_at else None


ECE = _error("ece", "ECE", lambda o: calibration_error(o.confidence, o.right))
ECE_TS = _error("ece_ts", "ECE, temperature fitted", _ece_at("ts"))
ECE_PROXY = _error("ece_proxy", "ECE, logit scale tuned on captions", _ece_at("proxy"))
ECE_ADAPTIVE = _error("ece_adaptive", "Adaptive ECE", lambda o: adaptive_error(o.confidence, o.right))
ECE_MAX = _error("ece_max", "Maximum calibration error", lambda o: calibration_error(o.confidence, o.right, norm="max"))
ECE_MAX_N = Metric(
    "ece_max_n",
    "Images in the bin of the maximum",
    0,
    "count",
    0,
    of=lambda o: worst_bin(o.confidence, o.right),
    classes=2,
    undefined=FEW,
)
ECE_L2 = _error("ece_l2", "L2 calibration error, debiased", lambda o: debiased_error(o.confidence, o.right))
ECE_L2_SQUARE = Metric(
    "ece_l2_square",
    "Squared L2 calibration error, debiased, unclipped",
    -1,
    digits=6,
    signed=True,
    interval="bca",
    of=lambda o: debiased_square(o.confidence, o.right),
    classes=2,
    undefined=FEW,
)
OVERCONFIDENCE = _error("overconfidence", "Overconfident part of ECE", lambda o: one_sided(o.confidence, o.right, 1))
UNDERCONFIDENCE = _error(
    "underconfidence", "Underconfident part of ECE", lambda o: one_sided(o.confidence, o.right, -1)
)
NLL = _loss("nll", "NLL", lambda o: mean_of(o.nll))
NLL_TS = _loss("nll_ts", "NLL, temperature fitted", _nll_at("ts"))
NLL_PROXY = _loss("nll_proxy", "NLL, logit scale tuned on captions", _nll_at("proxy"))
SIGNED_GAP = Metric(
    "signed_gap",
    "Signed gap",
    0,
    "share",
    1,
    True,
    of=lambda o: mean_of(o.confidence - o.right),
    classes=2,
    undefined=FEW,
)
MEAN_CONFIDENCE = Metric("mean_confidence", "Mean confidence", 0, "share", 1, of=lambda o: mean_of(o.confidence))
MEAN_ECE = ECE.over_severities()
MEAN_NLL = NLL.over_severities()

# -- plain functions ---------------------------------------------------------------------------------------------------


def confidence_of(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array, int]:
    """Confidence `[n]`, whether it was right (0 or 1), and the number of classes."""
    p, y = with_labels(probs, labels, "probs")
    return p.max(1), (p.argmax(1) == y).astype(np.float64), p.shape[1]


def beyond_one_class(statistic: Statistic | Ranked, classes: int, weights: Weights) -> float | Array:
    """With one class every sample is right and sure: there is nothing to calibrate."""
    value = statistic.plain(weights)
    return value if classes > 1 else value * np.nan


def reliability_bins(probs: ArrayLike, labels: ArrayLike, bins: int = BINS, weights: Weights = None) -> Bins:
    """Equal-width bins of the confidence (largest probability). `weights` at most `[n]`."""
    confidence, hit, _ = confidence_of(probs, labels)
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
    confidence, hit, classes = confidence_of(probs, labels)
    return beyond_one_class(calibration_error(confidence, hit, bins, norm), classes, weights)


def ece_max_n(probs: ArrayLike, labels: ArrayLike, bins: int = BINS, weights: Weights = None) -> float | Array:
    """Samples in the bin whose gap is the largest: a maximum over bins of one or two samples says little."""
    confidence, hit, classes = confidence_of(probs, labels)
    return beyond_one_class(worst_bin(confidence, hit, bins), classes, weights)


def adaptive_ece(probs: ArrayLike, labels: ArrayLike, bins: int = BINS, weights: Weights = None) -> float | Array:
    """ECE over bins of equal mass; equal confidences stay in one bin."""
    confidence, hit, classes = confidence_of(probs, labels)
    return beyond_one_class(adaptive_error(confidence, hit, bins), classes, weights)


def debiased_l2(
    probs: ArrayLike,
    labels: ArrayLike,
    bins: int = BINS,
    binning: Literal["mass", "width"] = "mass",
    square: bool = False,
    weights: Weights = None,
) -> float | Array:
    """Debiased L2 calibration error over bins of equal mass or width (Kumar et al. 1909.10155), at least 0; with
    `square` its square, which may be negative."""
    confidence, hit, classes = confidence_of(probs, labels)
    value = beyond_one_class(debiased_square(confidence, hit, bins, binning), classes, weights)
    if square:
        return value
    root = np.sqrt(np.maximum(value, 0))
    return float(root) if root.ndim == 0 else root


def mean_confidence(probs: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean of the largest probability."""
    p, _ = with_labels(probs, np.zeros(len(np.asarray(probs)), np.int64), "probs")
    return mean_of(p.max(1)).plain(weights)


def signed_gap(probs: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean confidence minus accuracy: positive is overconfident. Its size never exceeds the ECE."""
    confidence, hit, classes = confidence_of(probs, labels)
    return beyond_one_class(mean_of(confidence - hit), classes, weights)


def overconfidence(probs: ArrayLike, labels: ArrayLike, bins: int = BINS, weights: Weights = None) -> float | Array:
    """The part of ECE that overconfident bins make up."""
    confidence, hit, classes = confidence_of(probs, labels)
    return beyond_one_class(one_sided(confidence, hit, 1, bins), classes, weights)


def underconfidence(probs: ArrayLike, labels: ArrayLike, bins: int = BINS, weights: Weights = None) -> float | Array:
    """The part of ECE that underconfident bins make up; together with `overconfidence` it is the ECE."""
    confidence, hit, classes = confidence_of(probs, labels)
    return beyond_one_class(one_sided(confidence, hit, -1, bins), classes, weights)


def nll(logits: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean negative log-likelihood (nats) of softmax(logits)."""
    z, y = with_labels(logits, labels, "logits")
    losses = negative_log_likelihood(z, softmax_and_log_sum(z)[1], y)
    return beyond_one_class(mean_of(losses), z.shape[1], weights)


def nll_of_probs(probs: ArrayLike, labels: ArrayLike, weights: Weights = None) -> tuple[float | Array, int]:
    """The same from probabilities, and how many labels have probability 0: they count as the smallest normal float64,
    2.2e-308. From logits nothing is clipped."""
    p, y = with_labels(probs, labels, "probs")
    own = p[np.arange(len(y)), y]
    tiny = np.finfo(np.float64).tiny
    value = beyond_one_class(mean_of(-np.log(np.maximum(own, tiny))), p.shape[1], weights)
    return value, int((own < tiny).sum())
