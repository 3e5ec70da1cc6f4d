"""What is measured on weights (`qclip.spectral`): names, units and directions only."""

from __future__ import annotations

from .record import Metric

GAIN = Metric("gain", "Gain", digits=5)
GAIN_WHITE = Metric("gain_white", "Gain of white noise", digits=5)
SQNR = Metric("sqnr", "SQNR", unit="dB", digits=2)
SQNR_WHITE = Metric("sqnr_white", "SQNR of white noise", unit="dB", digits=2)
LEVEL = Metric("level", "Level (gain common to all ranks)", digits=5)
SHAPE = Metric("shape", "Shape (log of tail over head gain)", digits=5, signed=True)
ENERGY_REMOVED = Metric("energy_removed", "Energy removed from the band", unit="share", digits=2, signed=True)
PRINCIPAL_ANGLE = Metric("principal_angle", "Largest principal angle (degrees)", digits=2)
BAND_GAP = Metric("band_gap", "Gap at the band's end", unit="share", digits=2)
BAND_ENERGY = Metric("band_energy", "Energy in the band", unit="share", digits=2)
EFFECTIVE_RANK = Metric("effective_rank", "Effective rank", digits=1)
STABLE_RANK = Metric("stable_rank", "Stable rank", digits=1)
