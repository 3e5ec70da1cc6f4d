"""Retrieval: which place the best of a query's own entries has in a gallery."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .record import Metric

BLOCK = 16 << 20  # similarities at a time

IMAGE_TO_TEXT_RECALL = Metric("image_to_text_recall", "Image to text recall", 1, "share", 1)
TEXT_TO_IMAGE_RECALL = Metric("text_to_image_recall", "Text to image recall", 1, "share", 1)


def first_places(queries: np.ndarray, gallery: np.ndarray, owned: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place, from 0, of the best of its own entries for each query, int64 `[Q]`.

    queries `[Q, E]`, gallery `[G, E]`, both of unit length; float32 products. owned: int64 `[Q, 2]`, the half-open
    range of each query's own entries, at least one. Of equal similarities the lower index comes first.
    """
    queries, gallery = queries.astype(np.float32), gallery.astype(np.float32)
    out, index = np.empty(len(queries), np.int64), np.arange(len(gallery))
    step = max(1, BLOCK // len(gallery))
    for start in range(0, len(queries), step):
        similar = queries[start : start + step] @ gallery.T
        first, last = owned[start : start + step].T[:, :, None]
        own = np.where((index >= first) & (index < last), similar, -np.inf)
        best = own.argmax(1)[:, None]  # the lowest index of the largest
        value = np.take_along_axis(similar, best, axis=1)
        before = (similar > value) | ((similar == value) & (index < best))
        out[start : start + step] = before.sum(1)
    return out
