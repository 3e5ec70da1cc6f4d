"""Maximum softmax probability (Hendrycks & Gimpel 1610.02136)."""

from __future__ import annotations

import numpy as np

from ..sample import Sample
from . import Formula


def largest_softmax(logits: np.ndarray) -> np.ndarray:
    """The largest softmax probability along the last axis."""
    return 1 / np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)


def msp(sample: Sample) -> np.ndarray:
    """The largest softmax probability at the model's own logit scale."""
    return sample.softmax[0].max(1)


MSP = Formula("msp", "MSP", msp)
