"""Joint wins (`qclip.reliability.wins`): names and units only."""

from __future__ import annotations

from .record import Metric

WINS = Metric("wins", "Variants better in accuracy, ECE and AUROC at once", 0, "count", 0)
WINS_CLEAR = Metric("wins_clear", "The same with every interval clear of 0", 0, "count", 0)
WINS_EXPECTED = Metric("wins_expected", "Joint wins expected by chance", 0, "count", 2)
WINS_P = Metric("wins_p", "Chance of as many joint wins", digits=3)
