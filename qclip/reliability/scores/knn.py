"""Distance to the k-th nearest training image (Sun et al. 2204.06507)."""

from __future__ import annotations

import numpy as np

from qclip.metrics.arrays import Array

from ..sample import Known, Sample
from . import Score, UnfitError

NEIGHBOURS = 50
BLOCK = 4 << 20  # cosines at a time


class Nearest:
    """Minus the distance between unit embeddings to the 50th nearest training image; exact, no index."""

    name, label, needs = "knn", "KNN", frozenset({"train"})

    def __init__(self, train: Array | None = None, k: int = NEIGHBOURS) -> None:
        self.train, self.k, self.least = train, k, k  # unit embeddings [n, E]

    def fit(self, known: Known) -> Score:
        if len(known.images) < self.k:
            raise UnfitError(f"needs {self.k} training images or more, and {len(known.images)} were given")
        return Nearest(known.images.features, self.k)

    def __call__(self, sample: Sample) -> Array:
        assert self.train is not None
        step = max(1, BLOCK // len(self.train))
        out = np.empty(len(sample))
        for start in range(0, len(sample), step):
            rows = slice(start, start + step)
            cosines = sample.features[rows] @ self.train.T
            out[rows] = np.partition(cosines, len(self.train) - self.k, axis=1)[:, len(self.train) - self.k]
        return -np.sqrt(np.maximum(2 - 2 * out, 0))
