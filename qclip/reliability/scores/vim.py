"""Virtual logit matching (Wang et al. 2203.10807)."""

from __future__ import annotations

import numpy as np

from qclip.metrics.arrays import Array

from ..sample import Known, Sample
from . import Score, UnfitError


def principal_dimensions(width: int) -> int:
    """How many dimensions are principal: the paper's 1,000 of more than 1,500 and 512 of fewer; a half where 512 would
    leave no residual."""
    return 1000 if width > 1500 else 512 if width > 512 else width // 2


class Vim:
    """Energy minus alpha times the length of what lies outside the training images' principal directions.

    A zero-shot classifier has no bias, so the origin that the paper moves to is 0. alpha makes the virtual logit of
    training images as large, on average, as their largest one.
    """

    name, label, needs = "vim", "ViM", frozenset({"train"})

    def __init__(self, residual: Array | None = None, alpha: float = 0.0) -> None:
        self.residual, self.alpha = residual, alpha  # [E, E - D], orthonormal

    def fit(self, known: Known) -> Score:
        train = known.images
        width = train.features.shape[1]
        vectors = np.linalg.eigh(train.features.T @ train.features / len(train))[1]  # ascending eigenvalues
        residual = vectors[:, : width - principal_dimensions(width)]
        length = np.linalg.norm(train.features @ residual, axis=1).mean()
        if not length > 1e-12:
            raise UnfitError(f"needs training images that span more than {principal_dimensions(width)} dimensions")
        return Vim(residual, float(train.logits.max(1).mean() / length))

    @property
    def remark(self) -> str:
        width = 0 if self.residual is None else len(self.residual)
        return "" if width > 512 else f"embeddings have {width} dimensions, {principal_dimensions(width)} are principal"

    def __call__(self, sample: Sample) -> Array:
        assert self.residual is not None
        length = np.linalg.norm(sample.features @ self.residual, axis=1)
        return sample.softmax[1] - self.alpha * length
