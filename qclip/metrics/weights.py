"""What is measured on weights and features (`qclip.spectral`): names, units and directions only."""

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
MEAN_SHIFT = Metric("mean_shift", "Shift of the mean (in units of the spread)", digits=4)
BAND_TOP1 = Metric("band_top1", "Top-1 accuracy inside the band", 1, "share", digits=1)
BAND_TOP1_OWN = Metric("band_top1_own", "Top-1 inside the band of its own basis", 1, "share", digits=1)
BAND_TOP1_RANDOM = Metric("band_top1_random", "Top-1 inside as many random directions", 1, "share", digits=1)
BAND_TOP1_ENERGY = Metric("band_top1_energy", "Top-1 inside random directions of equal energy", 1, "share", digits=1)
HIGH_FREQUENCY = Metric("high_frequency", "Log amplitude of high frequencies of patch tokens", digits=3, signed=True)
GRATING_RESPONSE = Metric("grating_response", "1 - cosine under a grating", digits=4)
GRATING_TOP1 = Metric("grating_top1", "Top-1 accuracy with a grating minus without", 1, "share", digits=1, signed=True)
LOGIT_FACTOR = Metric("logit_factor", "Factor on the logit scale", digits=4)
