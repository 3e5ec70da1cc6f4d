"""Spectra of weights and features on the float model's own basis, beside controls that can say no."""

from .controls import CONTROLS, Control
from .features import feature_spectrum
from .fourier import fourier
from .gratings import gratings
from .interventions import through_model
from .pixels import Pixels
from .verdicts import Judgement, judgements, verdict
from .weights import weight_spectrum

__all__ = [
    "CONTROLS",
    "Control",
    "Judgement",
    "Pixels",
    "feature_spectrum",
    "fourier",
    "gratings",
    "judgements",
    "through_model",
    "verdict",
    "weight_spectrum",
]
