"""Negative entropy of the softmax."""

from __future__ import annotations

import numpy as np

from qclip.metrics.arrays import softmax_and_log_sum

from ..sample import Sample
from . import Formula


def negative_entropy(sample: Sample) -> np.ndarray:
    """sum p log p at the model's own logit scale; 0 log 0 = 0."""
    logits = sample.logits
    probabilities, log_sum = softmax_and_log_sum(logits)
    return (probabilities * (logits - log_sum[:, None])).sum(1)  # log p is finite where p underflows to 0


ENTROPY = Formula("entropy", "Entropy", negative_entropy)
