"""Accuracy, calibration, detection and selective prediction: plain functions, arrays in, a float out.

Everything is cast to float64 before it is sorted, binned or exponentiated. Inputs are what their names say (`logits`,
`probs`, scores); nothing is guessed from a range. NaN or Inf raises NonFiniteError with the count and the first index;
no samples, or shapes that do not fit, raise InputError. A metric that is undefined (one class, one side empty) is nan.

`weights` are counts of each sample: None, `[n]`, or `[B, n]` for B bootstrap replicates at once, which gives `[B]`
instead of a float. A replicate in which the metric is undefined is nan.

Each metric is defined once, as a function of resampled counts (`resampled.py`): `evaluate` draws its intervals from the
same definition that the plain functions call with one column of counts. `record.py` holds what else is said of it.
"""

from __future__ import annotations

from .accuracy import balanced_accuracy, label_ranks, top_k_accuracy
from .agreement import Flips, mcnemar
from .arrays import log_softmax, softmax
from .calibration import (
    Bins,
    Temperature,
    brier,
    ece,
    fit_temperature,
    mean_confidence,
    nll,
    reliability_bins,
    signed_gap,
)
from .detection import auroc, fpr_at_tpr, roc_curve_points
from .record import METRICS, Metric, metric
from .selective import aurc

__all__ = [
    "METRICS",
    "Bins",
    "Flips",
    "Metric",
    "Temperature",
    "auroc",
    "aurc",
    "balanced_accuracy",
    "brier",
    "ece",
    "fit_temperature",
    "fpr_at_tpr",
    "label_ranks",
    "log_softmax",
    "mcnemar",
    "mean_confidence",
    "metric",
    "nll",
    "reliability_bins",
    "roc_curve_points",
    "signed_gap",
    "softmax",
    "top_k_accuracy",
]
