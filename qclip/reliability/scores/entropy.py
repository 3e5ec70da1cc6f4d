"""Negative entropy of the softmax."""

from __future__ import annotations

import numpy as np

from ..sample import Sample
from . import Formula


def negative_entropy(sample: Sample) -> np.ndarray:
    """sum p log p at the model's own logit scale; 0 log 0 = 0."""
    probabilities, log_sum = sample.softmax
    logits = sample.logits
    logits -= log_sum[:, None]
    return np.einsum("nk,nk->n", probabilities, logits)  # log p is finite where p underflows to 0


ENTROPY = Formula("entropy", "Entropy", negative_entropy)
