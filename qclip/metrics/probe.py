"""What a linear probe is measured by."""

from __future__ import annotations

from .record import Metric

PROBE_TOP1 = Metric("probe_top1", "Linear probe, top-1", 1, "share", 1)
PROBE_C = Metric("probe_c", "Linear probe, C")
