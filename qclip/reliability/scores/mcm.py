"""Maximum concept matching (Ming et al. 2211.13445)."""

from __future__ import annotations

import numpy as np

from ..sample import Sample
from . import Formula
from .msp import largest_softmax


def mcm(sample: Sample) -> np.ndarray:
    """The largest softmax of the bare cosines, tau = 1."""
    return largest_softmax(sample.cosines)


MCM = Formula("mcm", "MCM", mcm)
