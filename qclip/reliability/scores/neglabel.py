"""Negative labels (Jiang et al. 2403.20078, "NegLabel"), as its published code computes it."""

from __future__ import annotations

import numpy as np

from qclip.metrics.arrays import Array

from ..sample import Known, Sample
from . import Score, UnfitError

QUANTILE, SHARE, GROUPS, SHARPNESS = 0.95, 0.15, 100, 100.0
BLOCK = 4 << 20  # cosines at a time


def farthest(negatives: Array, classes: Array) -> np.ndarray:
    """Positions of the 15 % of the words that are least like the classes: by the 0.95 quantile of their cosines."""
    step = max(1, BLOCK // len(classes))
    likeness = [
        np.quantile(negatives[start : start + step] @ classes.T, QUANTILE, axis=1)
        for start in range(0, len(negatives), step)
    ]
    return np.argsort(np.concatenate(likeness), kind="stable")[: int(SHARE * len(negatives))]


class NegativeLabels:
    """The share of the classes' exp(100 cos) beside that of words that are no class, mean over 100 groups of words.

    The groups are a random permutation (seed 0) of the chosen words in equal parts; what remains is dropped. With fewer
    than 100 words each is a group.
    """

    name, label, needs = "neglabel", "NegLabel", frozenset({"negatives"})

    def __init__(self, words: Array | None = None) -> None:
        self.words = words  # unit embeddings [groups, words in each, E]

    def fit(self, known: Known) -> Score:
        assert known.negatives is not None
        chosen = known.negatives[farthest(known.negatives, known.classes)]
        if not len(chosen):
            raise UnfitError(f"chooses 15 % of the words that are no class, and of {len(known.negatives)} that is none")
        groups = min(GROUPS, len(chosen))
        order = np.random.RandomState(0).permutation(len(chosen))[: len(chosen) // groups * groups]
        return NegativeLabels(chosen[order].reshape(groups, -1, chosen.shape[1]))

    @property
    def remark(self) -> str:
        if self.words is None:
            return ""
        groups, each, _ = self.words.shape
        return f"{groups * each} words that are no class, in {groups} groups"

    def __call__(self, sample: Sample) -> Array:
        assert self.words is not None
        groups, each, width = self.words.shape
        flat = self.words.reshape(-1, width).T
        step = max(1, BLOCK // flat.shape[1])
        out = np.empty(len(sample))
        for start in range(0, len(sample), step):
            rows = slice(start, start + step)
            known = np.exp(SHARPNESS * sample.cosines[rows]).sum(1, keepdims=True)  # at most e^100 each: no overflow
            others = np.exp(SHARPNESS * (sample.features[rows] @ flat)).reshape(-1, groups, each).sum(2)
            out[rows] = (known / (known + others)).mean(1)
        return out
