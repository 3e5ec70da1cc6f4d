"""Maximum concept matching (Ming et al. 2211.13445)."""

from __future__ import annotations

import numpy as np

from ..sample import Sample
from . import Formula


def mcm(sample: Sample) -> np.ndarray:
    """The largest softmax of the bare cosines, tau = 1."""
    cosines = sample.cosines
    return 1 / np.exp(cosines - cosines.max(1, keepdims=True)).sum(1)


MCM = Formula("mcm", "MCM", mcm)
