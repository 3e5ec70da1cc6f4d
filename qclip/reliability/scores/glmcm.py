"""Global and local maximum concept matching (Miyai et al. 2304.04521)."""

from __future__ import annotations

import numpy as np

from qclip.metrics.arrays import Array

from ..sample import Known, Sample
from . import Score
from .mcm import mcm
from .msp import largest_softmax

BLOCK = 4 << 20  # cosines at a time


class GlobalLocal:
    """MCM plus the largest softmax of the cosines of any patch; lambda = 1, tau = 1."""

    name, label, needs = "glmcm", "GL-MCM", frozenset({"patches"})

    def __init__(self, classes: Array | None = None) -> None:
        self.classes = classes

    def fit(self, known: Known) -> Score:
        return GlobalLocal(known.classes)

    def __call__(self, sample: Sample) -> Array:
        assert self.classes is not None and sample.patches is not None
        step = max(1, BLOCK // (sample.patches.shape[1] * len(self.classes)))
        local = [
            largest_softmax(sample.patches[start : start + step] @ self.classes.T).max(1)
            for start in range(0, len(sample), step)
        ]
        return mcm(sample) + np.concatenate(local)  # type: ignore[no-any-return]
