"""Whether one model's embeddings find in another's index what the index's own find: overlap of nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qclip.errors import InputError

from .record import Metric

BLOCK = 256  # queries at a time: [256, N] cosines, not [Q, N]

INDEX_RECALL = Metric("index_recall", "Neighbours kept: new queries, old image index", 1, "share", 1)
INDEX_RECALL_REVERSE = Metric("index_recall_reverse", "Neighbours kept: old queries, new image index", 1, "share", 1)
TEXT_RECALL = Metric("text_recall", "Images kept: new text queries, old image index", 1, "share", 1)
TEXT_RECALL_REVERSE = Metric("text_recall_reverse", "Images kept: old text queries, new image index", 1, "share", 1)


def neighbour_recall(
    queries: np.ndarray,
    index: np.ndarray,
    true_queries: np.ndarray,
    true_index: np.ndarray,
    ks: Sequence[int],
    own: np.ndarray | None = None,
) -> dict[int, np.ndarray]:
    """For each query the share of the k nearest of `true_queries` in `true_index` that are among the k nearest of
    `queries` in `index`: k -> float64 `[Q]`.

    Rows are unit vectors, float `[Q, E]` and `[N, E]`; near is a large inner product, and of equal ones the lower row
    of the index comes first. own: int `[Q]`, the row of the index that is the query itself and no neighbour of it.
    Raises InputError where shapes do not fit or the index holds fewer than k rows beside the query itself.
    """
    if queries.shape != true_queries.shape or index.shape != true_index.shape or queries.shape[1:] != index.shape[1:]:
        raise InputError(
            f"queries {queries.shape} and {true_queries.shape} and indexes {index.shape} and {true_index.shape} do not "
            "fit; compare embeddings of the same images and of one width"
        )
    there = len(index) - (own is not None)
    for k in ks:
        if not 1 <= k <= there:
            raise InputError(f"{k} neighbours of a query cannot be found among {there} other images; ask for fewer")
    out = {k: np.empty(len(queries)) for k in ks}
    for start in range(0, len(queries) if ks else 0, BLOCK):
        rows = slice(start, start + BLOCK)
        skipped = None if own is None else own[rows]
        found = _nearest(queries[rows] @ index.T, ks, skipped)
        true = _nearest(true_queries[rows] @ true_index.T, ks, skipped)
        for k in ks:
            out[k][rows] = (found[k] & true[k]).sum(1) / k
    return out


def _nearest(cosines: np.ndarray, ks: Sequence[int], own: np.ndarray | None) -> dict[int, np.ndarray]:
    """k -> bool `[q, N]`: the k largest of each row."""
    if own is not None:
        cosines[np.arange(len(cosines)), own] = -np.inf
    n = cosines.shape[1]
    ordered = np.partition(cosines, [n - k for k in ks], axis=1)
    out = {}
    for k in ks:
        least = ordered[:, n - k, None]
        near = cosines > least
        tied = cosines == least
        out[k] = near | (tied & (np.cumsum(tied, axis=1) <= k - near.sum(1, keepdims=True)))
    return out
