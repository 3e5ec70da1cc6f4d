"""Accuracy, calibration, detection and selective prediction: plain functions, arrays in, a float out.

Everything is cast to float64 before it is sorted, binned or exponentiated. Inputs are what their names say (`logits`,
`probs`, scores); nothing is guessed from a range. NaN or Inf raises NonFiniteError with the count and the first index;
no samples, or shapes that do not fit, raise InputError. A metric that is undefined (one class, one side empty) is nan.

`weights` are counts of each sample: None, `[n]`, or `[B, n]` for B bootstrap replicates at once, which gives `[B]`
instead of a float. A replicate in which the metric is undefined is nan.

Each metric is defined once, as a function of resampled counts (`resampled.py`): `evaluate` draws its intervals from the
same definition that the plain functions call with one column of counts. `record.py` holds what else is said of it;
`measure` gives all metrics of a labelled set from one pass over its logits.
"""

from __future__ import annotations

from .accuracy import balanced_accuracy, label_ranks, top_k_accuracy
from .agreement import divergence
from .arrays import log_softmax, softmax
from .bins import Bins
from .brier import BrierParts, brier, brier_parts
from .calibration import (
    adaptive_ece,
    debiased_l2,
    ece,
    ece_max_n,
    mean_confidence,
    nll,
    nll_of_probs,
    overconfidence,
    reliability_bins,
    signed_gap,
    underconfidence,
)
from .classwise import classwise_ece
from .detection import auroc, fpr_at_tpr, roc_curve_points, threshold_at
from .paired import DeLong, Flips, delong, holm, mcnemar, wilcoxon
from .precision import aupr
from .predictions import Predictions, measure, read
from .record import METRICS, Metric, metric
from .relative import corruption_errors, delta_rsg, relative_drop, rsg, vuln_add
from .selective import aurc, aurra, eaurc, risk_coverage
from .temperature import Temperature, fit_logit_scale, fit_temperature

__all__ = [
    "METRICS",
    "Bins",
    "BrierParts",
    "DeLong",
    "Flips",
    "Metric",
    "Predictions",
    "Temperature",
    "adaptive_ece",
    "aupr",
    "aurc",
    "auroc",
    "aurra",
    "balanced_accuracy",
    "brier",
    "brier_parts",
    "classwise_ece",
    "corruption_errors",
    "debiased_l2",
    "divergence",
    "delong",
    "delta_rsg",
    "eaurc",
    "ece",
    "ece_max_n",
    "fit_logit_scale",
    "fit_temperature",
    "fpr_at_tpr",
    "holm",
    "label_ranks",
    "log_softmax",
    "mcnemar",
    "mean_confidence",
    "measure",
    "metric",
    "nll",
    "nll_of_probs",
    "overconfidence",
    "read",
    "relative_drop",
    "reliability_bins",
    "risk_coverage",
    "roc_curve_points",
    "rsg",
    "signed_gap",
    "softmax",
    "threshold_at",
    "top_k_accuracy",
    "underconfidence",
    "vuln_add",
    "wilcoxon",
]
