"""A recipe of training beside its controls: what of a gain is due to rounding, and what to steps, noise, a scale."""

from __future__ import annotations

from .arms import CONTROLS, USUAL, Arm, arms
from .run import controlled

__all__ = ["CONTROLS", "USUAL", "Arm", "arms", "controlled"]
