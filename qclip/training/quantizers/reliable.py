"""LSQ that learns for reliability: its objective holds, besides the pairs and the float model's embeddings, stand-ins
for what is measured (docs/methods.md, Objectives)."""

from __future__ import annotations

from typing import Any, ClassVar

from ...ptq.base import NoOptions
from ...recipes import Treatment
from . import starts
from .lsq import LSQ


class Reliable(LSQ):
    """LSQ with an objective that aims at calibration, detection of what is unknown, and robustness"""

    name = "reliable"
    options = NoOptions
    paper = starts.Paper()  # it is ours
    objective: ClassVar[str] = "contrastive+10*mse+30*consensus+0.3*noise+0.3*margin"
    settings: ClassVar[dict[str, Any]] = {"rate": 2e-4}

    @classmethod
    def methods(cls, plan: Treatment) -> tuple[str, ...]:
        """Inputs of few bits are rotated first: their outliers cost the most (docs/methods.md, Rotation)."""
        return ("rotation",) if plan.activation_bits < 8 else ()
