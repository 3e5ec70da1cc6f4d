"""Generalized entropy (Liu, Lochman & Zach, "GEN", CVPR 2023)."""

from __future__ import annotations

import numpy as np

from ..sample import Sample
from . import Formula

GAMMA, LARGEST = 0.1, 100  # the constants of the paper and of OpenOOD


def gen(sample: Sample) -> np.ndarray:
    """-sum p^gamma (1 - p)^gamma over the M largest probabilities, all where there are fewer classes; gamma = 0.1, M =
    100."""
    p = sample.softmax[0].copy()
    rows, top = np.arange(len(p)), p.argmax(1)
    largest = p[rows, top]
    p[rows, top] = 0
    others = p.sum(1)  # 1 - p has no digits left where p is almost 1, and the power would show it
    if p.shape[1] > LARGEST:
        p = np.partition(p, -(LARGEST - 1), axis=1)[:, -(LARGEST - 1) :]
    # Where nothing was left out, the place of the largest holds 0, whose term is 0.
    return -((largest * others) ** GAMMA) - ((p * (1 - p)) ** GAMMA).sum(1)


GEN = Formula("gen", "GEN", gen)
