"""What groups of a set are measured by, beside accuracy within each."""

from __future__ import annotations

from .record import Metric

MEAN_WORST_GAP = Metric("mean_worst_gap", "Mean minus worst group", -1, "share", 1)
