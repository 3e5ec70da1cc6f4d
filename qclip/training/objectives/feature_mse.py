"""Distance of the embeddings to the float model's."""

from __future__ import annotations

from torch import Tensor

from . import Features


class FeatureMSE:
    """Mean over images and over texts of `|f - f_float|^2 = 2 (1 - cosine)` of unit embeddings: d times their MSE"""

    name = "mse"
    needs: frozenset[str] = frozenset()

    def __call__(self, features: Features) -> Tensor:
        image = (features.image - features.teacher_image).square().sum(-1).mean()
        text = (features.text - features.teacher_text).square().sum(-1).mean()
        return (image + text) / 2
