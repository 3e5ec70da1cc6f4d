"""Accuracy, calibration, detection and selective prediction: plain functions, arrays in, a float out.

Everything is cast to float64 before it is sorted, binned or exponentiated. Inputs are what their names say (`logits`,
`probs`, scores); nothing is guessed from a range. NaN or Inf raises NonFiniteError with the count and the first index;
no samples, or shapes that do not fit, raise InputError. A metric that is undefined (one class, one side empty) is nan.

`weights` are counts of each sample: None, `[n]`, or `[B, n]` for B bootstrap replicates at once, which gives `[B]`
instead of a float. A replicate in which the metric is undefined is nan.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qclip.errors import InputError, NonFiniteError

Array = NDArray[np.float64]
Weights = ArrayLike | None
_BLOCK = 2**22  # elements of a [B, n] intermediate that are held at once


# -- inputs -----------------------------------------------------------------------------------------------------------


def _finite(values: ArrayLike, name: str, ndim: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim:
        raise InputError(f"{name} has shape {array.shape}; {ndim} dimensions are needed.")
    bad = ~np.isfinite(array)
    if bad.any():
        first = np.argwhere(bad)[0].tolist()
        where = first[0] if ndim == 1 else tuple(first)
        raise NonFiniteError(
            f"{name} has {int(bad.sum())} values that are NaN or infinite, the first at index {where}."
        )
    return array


def _pair(values: ArrayLike, labels: ArrayLike, name: str) -> tuple[Array, NDArray[np.int64]]:
    array, label = _finite(values, name, 2), np.asarray(labels)
    if len(array) == 0 or array.shape[1] == 0:
        raise InputError(f"{name} of shape {array.shape} holds no samples.")
    if label.shape != (len(array),) or not np.issubdtype(label.dtype, np.integer):
        raise InputError(f"labels are {label.dtype} {label.shape}; integers of shape ({len(array)},) are needed.")
    wrong = np.flatnonzero((label < 0) | (label >= array.shape[1]))
    if len(wrong):
        raise InputError(f"label {label[wrong[0]]} at index {wrong[0]} is outside 0..{array.shape[1] - 1}.")
    if name == "probs":
        off = np.flatnonzero((array.min(1) < 0) | (np.abs(array.sum(1) - 1) > 1e-3))
        if len(off):
            raise InputError(
                f"probs: row {off[0]} is no distribution (sum {array[off[0]].sum():.4g}, minimum "
                f"{array[off[0]].min():.4g}); give softmax outputs."
            )
    return array, label.astype(np.int64)


def _counts(weights: Weights, n: int, name: str = "weights") -> tuple[Array, bool]:
    """`[B, n]`, and whether the caller wants one float."""
    if weights is None:
        return np.ones((1, n)), True
    array = np.asarray(weights, dtype=np.float64)
    if array.ndim not in (1, 2) or array.shape[-1] != n:
        raise InputError(f"{name} have shape {array.shape}; ({n},) or (B, {n}) is needed.")
    if not np.isfinite(array).all() or (array < 0).any():
        raise InputError(f"{name} must be finite and not negative.")
    return np.atleast_2d(array), array.ndim == 1


def _result(values: Array, single: bool) -> float | Array:
    return float(values[0]) if single else values


def _ratio(top: Array, bottom: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom > 0, top / bottom, np.nan)


def _mean(values: Array, weights: Weights) -> float | Array:
    counts, single = _counts(weights, len(values))
    return _result(_ratio(counts @ values, counts.sum(1)), single)


def log_softmax(logits: ArrayLike) -> Array:
    """float64 `[n, K]`, maximum subtracted first."""
    z = _finite(logits, "logits", 2)
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def softmax(logits: ArrayLike) -> Array:
    """float64 `[n, K]`."""
    return np.exp(log_softmax(logits))


# -- accuracy ---------------------------------------------------------------------------------------------------------


def label_ranks(logits: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """Rank of each label `[n]`, 0 = predicted; among equals the lowest class comes first, as argmax has it."""
    z, y = _pair(logits, labels, "logits")
    own = z[np.arange(len(z)), y][:, None]
    return (z > own).sum(1) + ((z == own) & (np.arange(z.shape[1]) < y[:, None])).sum(1)


def top_k_accuracy(logits: ArrayLike, labels: ArrayLike, k: int = 1, weights: Weights = None) -> float | Array:
    """Share of samples whose label is among the k largest of `[n, K]`. Raises InputError where k > K."""
    ranks, classes = label_ranks(logits, labels), np.shape(logits)[1]
    if not 1 <= k <= classes:
        raise InputError(f"top-{k} accuracy is not defined for {classes} classes.")
    return _mean((ranks < k).astype(np.float64), weights)


def balanced_accuracy(logits: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean recall over the classes that occur in `labels`."""
    hit, y = (label_ranks(logits, labels) == 0).astype(np.float64), np.asarray(labels)
    present = np.unique(y)
    member = (y[:, None] == present).astype(np.float64)
    counts, single = _counts(weights, len(y))
    recall = _ratio(counts @ (member * hit[:, None]), counts @ member)
    seen = ~np.isnan(recall)
    return _result(_ratio(np.where(seen, recall, 0).sum(1), seen.sum(1).astype(np.float64)), single)


# -- calibration ------------------------------------------------------------------------------------------------------


def _confidence(probs: ArrayLike, labels: ArrayLike) -> tuple[Array, Array, int]:
    p, y = _pair(probs, labels, "probs")
    return p.max(1), (p.argmax(1) == y).astype(np.float64), p.shape[1]


def _bin_of(confidence: Array, bins: int) -> NDArray[np.int64]:
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


def reliability_bins(probs: ArrayLike, labels: ArrayLike, bins: int = 15, weights: Weights = None) -> Bins:
    """Equal-width bins of the confidence (largest probability). `weights` at most `[n]`."""
    confidence, hit, _ = _confidence(probs, labels)
    counts, single = _counts(weights, len(hit))
    if not single:
        raise InputError("reliability_bins takes one set of weights, not several replicates.")
    member = np.eye(bins)[_bin_of(confidence, bins)]
    count = (counts @ member)[0]
    sums = [(counts * v @ member)[0] for v in (hit, confidence)]
    return Bins(np.arange(bins + 1) / bins, count, _ratio(sums[0], count), _ratio(sums[1], count))


def ece(
    probs: ArrayLike,
    labels: ArrayLike,
    bins: int = 15,
    norm: Literal["l1", "l2", "max"] = "l1",
    weights: Weights = None,
) -> float | Array:
    """Expected calibration error, (sum_b n_b/n |acc_b - conf_b|^p)^(1/p); `max` is the largest over non-empty bins."""
    confidence, hit, classes = _confidence(probs, labels)
    counts, single = _counts(weights, len(hit))
    member = np.eye(bins)[_bin_of(confidence, bins)]
    count, off = counts @ member, np.abs(counts @ (member * (hit - confidence)[:, None]))
    total = count.sum(1)
    if norm == "l1":
        value = _ratio(off.sum(1), total)
    elif norm == "l2":
        value = np.sqrt(_ratio(np.where(count > 0, off * _ratio(off, count), 0).sum(1), total))
    elif norm == "max":
        value = np.where(total > 0, np.where(count > 0, _ratio(off, count), 0).max(1), np.nan)
    else:
        raise InputError(f"unknown norm {norm!r}; known: l1, l2, max.")
    return _result(value if classes > 1 else np.full_like(value, np.nan), single)


def mean_confidence(probs: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean of the largest probability."""
    p, _ = _pair(probs, np.zeros(len(np.asarray(probs)), np.int64), "probs")
    return _mean(p.max(1), weights)


def signed_gap(probs: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean confidence minus accuracy: positive is overconfident. Its size never exceeds the ECE."""
    confidence, hit, classes = _confidence(probs, labels)
    return _mean(confidence - hit if classes > 1 else np.full(len(hit), np.nan), weights)


def nll(logits: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean negative log-likelihood (nats) of softmax(logits)."""
    z, y = _pair(logits, labels, "logits")
    losses = -log_softmax(z)[np.arange(len(y)), y]
    return _mean(losses if z.shape[1] > 1 else np.full(len(y), np.nan), weights)


def brier(probs: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean of sum_k (p_k - 1[y = k])^2, in 0..2 (twice scikit-learn's binary score)."""
    p, y = _pair(probs, labels, "probs")
    own = p[np.arange(len(y)), y]
    losses = (p**2).sum(1) - own**2 + (1 - own) ** 2
    return _mean(losses if p.shape[1] > 1 else np.full(len(y), np.nan), weights)


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
    z, y = _pair(logits, labels, "logits")
    counts, single = _counts(weights, len(y))
    if not single:
        raise InputError("fit_temperature takes one set of weights, not several replicates.")
    w = counts[0] / counts[0].sum() if counts[0].sum() > 0 else None
    if w is None:
        raise InputError("all weights are zero: there is nothing to fit a temperature to.")
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


# -- detection: scores are higher for ID ------------------------------------------------------------------------------


def _sides(id_scores: ArrayLike, ood_scores: ArrayLike) -> tuple[Array, Array]:
    inside, outside = _finite(id_scores, "id_scores", 1), _finite(ood_scores, "ood_scores", 1)
    if not len(inside) and not len(outside):
        raise InputError("id_scores and ood_scores are both empty.")
    return inside, outside


def _side_counts(id_weights: Weights, ood_weights: Weights, n_id: int, n_ood: int) -> tuple[Array, Array, bool]:
    first, single = _counts(id_weights, n_id, "id_weights")
    second, also_single = _counts(ood_weights, n_ood, "ood_weights")
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise InputError(f"id_weights hold {len(first)} replicates, ood_weights {len(second)}.")
    return first, second, single and also_single


def _in_blocks(function, first: Array, second: Array) -> Array:
    """Calls `function` on a few replicates at a time; a side with one replicate serves all of the other's."""
    total = max(len(first), len(second))
    step = max(1, _BLOCK // max(first.shape[1], second.shape[1], 1))
    parts = []
    for start in range(0, total, step):
        parts.append(function(*(w if len(w) == 1 else w[start : start + step] for w in (first, second))))
    return np.concatenate(parts) if total > 1 else parts[0]


def auroc(
    id_scores: ArrayLike, ood_scores: ArrayLike, id_weights: Weights = None, ood_weights: Weights = None
) -> float | Array:
    """P(ID score > OOD score), ties counting one half; nan where a side is empty."""
    inside, outside = _sides(id_scores, ood_scores)
    first, second, single = _side_counts(id_weights, ood_weights, len(inside), len(outside))
    order = np.argsort(outside, kind="stable")
    left, right = (np.searchsorted(outside[order], inside, side) for side in ("left", "right"))

    def area(w: Array, v: Array) -> Array:
        below = np.concatenate([np.zeros((len(v), 1)), np.cumsum(v[:, order], axis=1)], axis=1)
        won = (w * (below[:, left] + below[:, right])).sum(1) / 2
        return _ratio(won, w.sum(1) * v.sum(1))

    return _result(_in_blocks(area, first, second), single)


def fpr_at_tpr(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    tpr: float = 0.95,
    positive: Literal["id", "ood"] = "id",
    id_weights: Weights = None,
    ood_weights: Weights = None,
) -> float | Array:
    """False positive rate at the largest threshold whose true positive rate is at least `tpr`; no interpolation.

    `positive="id"`: share of OOD that is accepted when 95 % of ID is (MCM and most CLIP papers). `positive="ood"`:
    share of ID that is rejected when 95 % of OOD is caught (OpenOOD 1.5). nan where a side is empty.
    """
    inside, outside = _sides(id_scores, ood_scores)
    first, second, single = _side_counts(id_weights, ood_weights, len(inside), len(outside))
    if not 0 < tpr <= 1:
        raise InputError(f"tpr is {tpr}; a share over 0, at most 1, is needed.")
    if positive not in ("id", "ood"):
        raise InputError(f"positive is {positive!r}; known: id, ood.")
    if positive == "ood":
        inside, outside, first, second = -outside, -inside, second, first
    if not len(inside) or not len(outside):
        return _result(np.full(max(len(first), len(second)), np.nan), single)
    best_first = np.argsort(-inside, kind="stable")
    order = np.argsort(outside, kind="stable")
    rejected = np.searchsorted(outside[order], inside[best_first], "left")  # negatives below each positive

    def rate(w: Array, v: Array) -> Array:
        kept = np.cumsum(w[:, best_first], axis=1)
        at = (kept >= tpr * kept[:, -1:] * (1 - 1e-12)).argmax(1)  # the guard: 0.95 * n may round above a whole number
        below = np.concatenate([np.zeros((len(v), 1)), np.cumsum(v[:, order], axis=1)], axis=1)
        cut, total = rejected[at], below[:, -1]
        accepted = total - below[np.arange(len(v)), cut]  # a side with one replicate broadcasts
        return np.where(kept[:, -1] > 0, _ratio(accepted, total), np.nan)

    return _result(_in_blocks(rate, first, second), single)


def roc_curve_points(id_scores: ArrayLike, ood_scores: ArrayLike, fpr: ArrayLike | None = None) -> tuple[Array, Array]:
    """ROC curve with ID positive: (fpr, tpr) at every distinct threshold from (0, 0) to (1, 1).

    With `fpr` the curve is read at these rates: the highest TPR there, linear between corners (which ties make).
    Raises InputError where a side is empty.
    """
    inside, outside = _sides(id_scores, ood_scores)
    if not len(inside) or not len(outside):
        raise InputError("a ROC curve needs ID and OOD scores.")
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    rates = [
        np.concatenate([[0.0], (len(s) - np.searchsorted(np.sort(s), thresholds, "left")) / len(s)])
        for s in (outside, inside)
    ]
    if fpr is None:
        return rates[0], rates[1]
    wanted = np.asarray(fpr, np.float64)
    corners, last = np.unique(rates[0][::-1], return_index=True)  # first in reverse = highest TPR of each FPR
    return wanted, np.interp(wanted, corners, rates[1][::-1][last])


# -- selective prediction ---------------------------------------------------------------------------------------------


def aurc(probs: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Area under the risk-coverage curve, confidence descending; ties give the mean over all their orders.

    In a run of m equal confidences after k0 samples with E0 errors, g of them errors, the sum over the run
    sum_j (E0 + g j/m)/(k0 + j) is g + (E0 - g k0/m)(H(k0+m) - H(k0)), H harmonic numbers. `weights` are whole numbers.
    """
    confidence, hit, _ = _confidence(probs, labels)
    counts, single = _counts(weights, len(hit))
    if (counts != np.rint(counts)).any():
        raise InputError("aurc counts samples: its weights must be whole numbers.")
    order = np.argsort(-confidence, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(confidence[order]) != 0]))
    wrong = 1 - hit[order]
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int(counts.sum(1).max()) + 1))])

    def area(w: Array, _: Array) -> Array:
        w = w[:, order]
        m, g = np.add.reduceat(w, starts, axis=1), np.add.reduceat(w * wrong, starts, axis=1)
        after, errors = np.cumsum(m, axis=1), np.cumsum(g, axis=1)
        before = after - m
        share = np.where(m > 0, g / np.maximum(m, 1), 0)
        steps = harmonic[after.astype(np.int64)] - harmonic[before.astype(np.int64)]
        return _ratio((g + (errors - g - share * before) * steps).sum(1), after[:, -1])

    return _result(_in_blocks(area, counts, np.ones((1, 1))), single)
