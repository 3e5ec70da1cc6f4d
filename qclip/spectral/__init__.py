"""Spectra of weights on the float model's own basis, beside a control that says what noise alone would do."""

from .weights import verdict, weight_spectrum

__all__ = ["verdict", "weight_spectrum"]
