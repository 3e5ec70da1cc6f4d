"""Scores that look at patches. They are read batch by batch: the patch embeddings of a set are too large to keep."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from qclip.errors import InputError, NonFiniteError
from qclip.models import ValuePath
from qclip.store import Entry

from .outputs import scored
from .sample import Sample, unit
from .scores import Score


@dataclasses.dataclass(frozen=True)
class Local:
    """Fitted scores of one model that need patches."""

    label: str
    path: ValuePath
    classifier: np.ndarray
    scale: float
    scores: Mapping[str, Score]

    def without(self, name: str) -> Local:
        """The same but for one score."""
        return dataclasses.replace(self, scores={key: score for key, score in self.scores.items() if key != name})

    @property
    def key(self) -> list[str]:
        """What the values depend on beside the model and the images."""
        classes = hashlib.sha256(self.classifier.tobytes()).hexdigest()
        versions = [f"{name} {getattr(score, 'version', 1)}" for name, score in self.scores.items()]
        return [classes, str(self.scale), *versions]

    def __call__(
        self, encode: Callable[[Tensor], Tensor], images: Tensor, vectors: np.ndarray
    ) -> dict[str, np.ndarray]:
        """float64 `[b]` of each score, for preprocessed images and their embeddings `[b, E]`; NaN where one of these or
        of the patches' is not finite: who reads them says so."""
        patches = self.path.patches(encode, images).float().cpu().numpy()
        try:
            features = unit(vectors, f"image embeddings of {self.label!r}")
            flat = unit(patches.reshape(-1, patches.shape[-1]), f"patch embeddings of {self.label!r}")
        except NonFiniteError:
            return {name: np.full(len(vectors), np.nan) for name in self.scores}
        if flat.shape[1] != self.classifier.shape[1]:
            raise InputError(
                f"patch embeddings of {self.label!r} have {flat.shape[1]} dimensions, its classes "
                f"{self.classifier.shape[1]}; leave out scores that look at patches (--score)"
            )
        sample = Sample(
            features, features @ self.classifier.T, self.scale, patches=flat.reshape(len(patches), -1, flat.shape[1])
        )
        return {name: scored(name, score, sample) for name, score in self.scores.items()}


def unsound(entry: Entry, names: list[str], images: int) -> str:
    """What is wrong with stored values of these scores for so many readable images, "" where nothing is."""
    for name in names:
        values = entry.arrays.get(name)
        if values is None or values.dtype != np.float64 or values.shape != (images,) or not np.isfinite(values).all():
            return f"its values of {name} are not {images} finite numbers"
    return ""
