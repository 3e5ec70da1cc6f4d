"""Generalized entropy (Liu, Lochman & Zach, "GEN", CVPR 2023)."""

from __future__ import annotations

import numpy as np

from qclip.metrics.arrays import softmax_and_log_sum

from ..sample import Sample
from . import Formula

GAMMA, LARGEST = 0.1, 100  # the constants of the paper and of OpenOOD


def gen(sample: Sample) -> np.ndarray:
    """-sum p^gamma (1 - p)^gamma over the M largest probabilities, all where there are fewer classes; gamma = 0.1, M =
    100."""
    p, _ = softmax_and_log_sum(sample.logits)
    rows, top = np.arange(len(p)), p.argmax(1)
    others = p.copy()
    others[rows, top] = 0
    rest = 1 - p
    rest[rows, top] = others.sum(1)  # 1 - p has no digits left where p is almost 1, and the power would show it
    terms = (p * rest) ** GAMMA
    if terms.shape[1] > LARGEST:
        largest = np.argpartition(p, -LARGEST, axis=1)[:, -LARGEST:]
        terms = np.take_along_axis(terms, largest, axis=1)
    return -terms.sum(1)


GEN = Formula("gen", "GEN", gen)
