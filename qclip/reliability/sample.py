"""What an OOD score sees of a set."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sample:
    """Images of a set as one model sees them.

    features: unit image embeddings float64 `[n, E]`. cosines: to the class embeddings `[n, K]`. scale: the exp'd logit
    scale. labels: int64 `[n]`, None for a set of other classes. patches: unit patch embeddings `[n, P, E]`, None where
    they were not asked for.
    """

    features: np.ndarray
    cosines: np.ndarray
    scale: float
    labels: np.ndarray | None = None
    patches: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def logits(self) -> np.ndarray:
        return self.scale * self.cosines
