"""A shard of images as the store has it: what is kept of each model, and what is wrong with an entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from PIL import Image

from qclip import data as qdata
from qclip.store import Entry

from .local import Local


@dataclasses.dataclass(frozen=True)
class Stage:
    """One set of images in one condition."""

    data: qdata.ImageSet
    corruption: str = ""
    severity: int = 0
    local: Mapping[str, Local] = dataclasses.field(default_factory=dict)  # by model label: what is read of patches

    @property
    def key(self) -> tuple[str, str, int]:
        return self.data.digest, self.corruption, self.severity

    @property
    def name(self) -> str:
        return f"{self.data.name} {self.corruption} {self.severity}" if self.corruption else self.data.name


@dataclasses.dataclass
class Embedded:
    """Image embeddings float32 `[m, E]`, of any length, of the readable images at `indices` `[m]`; the seconds they
    took when they were computed, which may have been in an earlier run; and what scores say of their patches."""

    indices: np.ndarray
    vectors: np.ndarray
    seconds: float
    unreadable: list[tuple[int, str]]
    local: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # score name -> float64 [m]


def unfit_vectors(entry: Entry, rows: int) -> str:
    """What is wrong with stored vectors, "" where nothing is. NaN is not stored: it is computed and raised again."""
    vectors = entry.arrays.get("vectors")
    if vectors is None or vectors.dtype != np.float32 or vectors.ndim != 2 or len(vectors) != rows:
        found = "none" if vectors is None else f"{vectors.dtype} {list(vectors.shape)}"
        return f"its vectors are {found}, not float32 [{rows}, width]"
    return "" if np.isfinite(vectors).all() else "its vectors hold NaN or infinite values"


def unsound_images(entry: Entry, images: int) -> str:
    """What is wrong with the stored embeddings of so many images."""
    indices, unreadable = entry.arrays.get("indices"), entry.facts.get("unreadable")
    if indices is None or indices.dtype != np.int64 or indices.ndim != 1:
        return "it has no indices of its images"
    if not isinstance(unreadable, list) or not all(
        isinstance(bad, list) and len(bad) == 2 and type(bad[0]) is int and isinstance(bad[1], str)
        for bad in unreadable
    ):
        return "its list of unreadable images has another form"
    if sorted([*indices.tolist(), *(i for i, _ in unreadable)]) != list(range(images)) or (np.diff(indices) < 0).any():
        return f"its images are not those of the set (0..{images - 1}, in order)"
    seconds = entry.facts.get("seconds")
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < float("inf"):
        return "its time is no number of seconds"
    return unfit_vectors(entry, len(indices))


def readable_now(data: qdata.ImageSet, unreadable: list[tuple[int, str]]) -> bool:
    """Whether an image that could not be read before can be read now: a file was gone, or memory was short."""
    found = data.read([index for index, _ in unreadable])
    return any(isinstance(image, Image.Image) and not qdata.too_large(image.size) for image in found)
