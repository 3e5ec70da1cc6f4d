"""How near a model's outputs are to those of its reference, image by image."""

from __future__ import annotations

import numpy as np

from .arrays import log_softmax
from .record import Metric

AGREEMENT = Metric("agreement", "Same prediction as the reference", 1, "share", 1)
COSINE_MEAN = Metric("cosine_mean", "Mean cosine", 1, digits=5)
COSINE_MIN = Metric("cosine_min", "Smallest cosine", 1)
KL = Metric("kl", "Divergence from the reference", -1, "nats", digits=5)

SENSITIVITY = Metric("sensitivity", "Embedding error of this alone", -1, digits=6)
SENSITIVITY_KL = Metric("sensitivity_kl", "Divergence by this alone", -1, "nats", digits=6)
SENSITIVITY_TOP1 = Metric("sensitivity_top1", "Accuracy changed by this alone", 1, "share", 1, signed=True)
SENSITIVITY_ECE = Metric("sensitivity_ece", "ECE changed by this alone", -1, "share", 1, signed=True)


def divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(logits)) in nats, per row of `[n, K]`: float64 `[n]`, never below 0. What the
    model's probabilities lose of the reference's, however often both name the same class."""
    log_p, log_q = log_softmax(reference), log_softmax(logits)
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(1), 0)
