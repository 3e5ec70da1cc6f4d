"""Spectra of weights on the float model's own basis, beside controls that can say no."""

from .controls import CONTROLS, Control
from .verdicts import Judgement, judgements, verdict
from .weights import weight_spectrum

__all__ = ["CONTROLS", "Control", "Judgement", "judgements", "verdict", "weight_spectrum"]
