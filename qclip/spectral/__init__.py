"""Spectra of weights on the float model's own basis, beside a control that says what noise alone would do."""

from .damping import Damping, damping, verdict
from .weights import weight_spectrum

__all__ = ["Damping", "damping", "verdict", "weight_spectrum"]
