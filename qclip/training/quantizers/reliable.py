"""LSQ that learns for reliability: its objective holds, besides the pairs and the float model's embeddings, stand-ins
for what is measured (docs/methods.md, Objectives)."""

from __future__ import annotations

from typing import Any, ClassVar

from .lsq import LSQ


class Reliable(LSQ):
    """LSQ with an objective that aims at calibration, detection of what is unknown, and robustness"""

    name = "reliable"
    objective: ClassVar[str] = "contrastive+100*mse"
    settings: ClassVar[dict[str, Any]] = {}
