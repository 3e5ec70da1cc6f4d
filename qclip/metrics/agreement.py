"""How near a model's outputs are to those of its reference, image by image."""

from __future__ import annotations

from .record import Metric

AGREEMENT = Metric("agreement", "Same prediction as the reference", 1, "share", 1)
COSINE_MEAN = Metric("cosine_mean", "Mean cosine", 1, digits=5)
COSINE_MIN = Metric("cosine_min", "Smallest cosine", 1)
