"""What quantizing each site alone does to a model, and which widths spend a size best."""

from __future__ import annotations

from .budget import Budget, budgeted
from .measure import BITS, SAMPLES, probe_of, sensitivity, together

__all__ = ["BITS", "SAMPLES", "Budget", "budgeted", "probe_of", "sensitivity", "together"]
