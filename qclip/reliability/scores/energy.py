"""Energy (Liu et al. 2010.03759)."""

from __future__ import annotations

import numpy as np

from ..sample import Sample
from . import Formula


def energy(sample: Sample) -> np.ndarray:
    """log sum exp of the logits, T = 1."""
    return sample.softmax[1]


ENERGY = Formula("energy", "Energy", energy)
