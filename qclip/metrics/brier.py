"""The Brier score, and what it is made of."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from qclip.errors import InputError

from .arrays import Array, Weights, finite, ratio, with_labels
from .bins import BINS, bin_of
from .calibration import FEW, beyond_one_class
from .record import Metric
from .resampled import Statistic, Sums, mean_of

Part = Literal["reliability", "resolution", "uncertainty", "within_variance", "within_covariance"]
PARTS: tuple[Part, ...] = ("reliability", "resolution", "uncertainty", "within_variance", "within_covariance")


def squared_error(probs: Array, labels: np.ndarray) -> Array:
    """sum_k (p_k - 1[y = k])^2 of each sample `[n]`."""
    return np.einsum("nk,nk->n", probs, probs) - 2 * probs[np.arange(len(labels)), labels] + 1


def component(forecast: Array, outcome: np.ndarray, part: Part, bins: int = BINS) -> Statistic:
    """A part of mean (f - a)^2 for forecasts f in 0..1 and outcomes a of 0 or 1, over equal-width bins of f:
    score = reliability - resolution + uncertainty + within_variance - within_covariance.

    The first three are Murphy's (1973); the last two vanish where f is constant in a bin (Stephenson et al. 2008).
    """
    f, a = np.asarray(forecast, np.float64), np.asarray(outcome, np.float64)

    def combine(n: Array, conf: Array, acc: Array, squares: Array, both: Array) -> Array:
        total, there = n.sum(0), n > 0
        base = ratio(acc.sum(0), total)
        mean = np.where(there, ratio(acc, n), 0)
        if part == "uncertainty":
            return base * (1 - base)
        if part == "resolution":
            each = n * (mean - base) ** 2
        elif part == "reliability":
            each = np.where(there, ratio((conf - acc) ** 2, n), 0)
        elif part == "within_variance":
            each = squares - np.where(there, ratio(conf**2, n), 0)
        else:
            each = 2 * (both - conf * mean)
        return ratio(np.where(there, each, 0).sum(0), total)

    where = bin_of(f, bins)
    return Statistic([Sums(each, where, bins) for each in (np.ones(len(f)), f, a, f * f, f * a)], combine)


BRIER = Metric("brier", "Brier score", -1, digits=3, of=lambda o: mean_of(o.brier), classes=2, undefined=FEW)
BRIER_TOP = Metric(
    "brier_top",
    "Brier score of the confidence",
    -1,
    digits=4,
    of=lambda o: mean_of((o.confidence - o.right) ** 2),
    classes=2,
    undefined=FEW,
)


def _part(name: str, part: Part, better: Literal[-1, 0, 1]) -> Metric:
    return Metric(
        name,
        f"Brier score of the confidence: {part.replace('_', ' ')}",
        better,
        digits=4,
        interval="bca" if better else "percentile",
        of=lambda o: component(o.confidence, o.right, part),
        classes=2,
        undefined=FEW,
    )


BRIER_REL = _part("brier_rel", "reliability", -1)
BRIER_RES = _part("brier_res", "resolution", 1)
BRIER_UNC = _part("brier_unc", "uncertainty", 0)
BRIER_WBV = _part("brier_wbv", "within_variance", 0)
BRIER_WBC = _part("brier_wbc", "within_covariance", 0)


@dataclasses.dataclass(frozen=True)
class BrierParts:
    """score = reliability - resolution + uncertainty + within_variance - within_covariance."""

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within_variance: float
    within_covariance: float


def brier_parts(forecast: ArrayLike, outcome: ArrayLike, bins: int = BINS) -> BrierParts:
    """The parts of mean (f - a)^2: f `[n]` in 0..1, a `[n]` of 0 and 1. For a classifier f is the confidence and a
    whether it was right, or f the probability of one class and a whether it is the label. Raises InputError."""
    f, a = finite(forecast, "forecast", 1), finite(outcome, "outcome", 1)
    if not len(f) or f.shape != a.shape:
        raise InputError(f"forecast {f.shape} and outcome {a.shape} need one length, and at least one sample.")
    if f.min() < 0 or f.max() > 1 or not np.isin(a, (0, 1)).all():
        raise InputError("forecasts must lie in 0..1 and outcomes be 0 or 1.")
    score = float(np.mean((f - a) ** 2))
    return BrierParts(score, **{part: component(f, a, part, bins).plain() for part in PARTS})  # type: ignore[arg-type]


def brier(probs: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Mean of sum_k (p_k - 1[y = k])^2, in 0..2 (twice scikit-learn's binary score)."""
    p, y = with_labels(probs, labels, "probs")
    return beyond_one_class(mean_of(squared_error(p, y)), p.shape[1], weights)
