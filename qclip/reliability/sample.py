"""What an OOD score sees of a set, and what it may learn from beforehand."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from qclip.errors import NonFiniteError
from qclip.metrics.arrays import softmax_and_log_sum


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

    @functools.cached_property
    def softmax(self) -> tuple[np.ndarray, np.ndarray]:
        """Softmax `[n, K]` of the logits and their log sum exp `[n]`, made once for all scores: not to be changed."""
        return softmax_and_log_sum(self.logits)


@dataclasses.dataclass(frozen=True)
class Known:
    """What a score may learn from, as one model sees it.

    classes: unit class embeddings float64 `[K, E]`. scale: the exp'd logit scale. train: the training images, with
    labels where they have some, without patches. negatives: unit embeddings `[M, E]` of words that are no class.
    """

    classes: np.ndarray
    scale: float
    train: Sample | None = None
    negatives: np.ndarray | None = None

    @property
    def images(self) -> Sample:
        """`train`, of a score that needs it."""
        assert self.train is not None
        return self.train


def unit(vectors: np.ndarray, what: str) -> np.ndarray:
    """Rows of unit length, float64. Raises NonFiniteError naming `what`, how many rows, and the first."""
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if len(bad):
        raise NonFiniteError(
            f"{len(bad)} of {len(vectors)} {what} are NaN, Inf or zero, the first at row {bad[0]}; "
            "check the model's weights and its input"
        )
    return vectors / norms
