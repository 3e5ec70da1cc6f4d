"""What every metric begins with: finite arrays, labels, counts, softmax."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qclip.errors import InputError, NonFiniteError

Array = NDArray[np.float64]
Weights = ArrayLike | None


def finite(values: ArrayLike, name: str, ndim: int) -> Array:
    """float64 with `ndim` dimensions. Raises InputError, NonFiniteError with the count and the first index."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim:
        raise InputError(f"{name} has shape {array.shape}; {ndim} dimensions are needed.")
    bad = ~np.isfinite(array)
    if bad.any():
        first = np.argwhere(bad)[0].tolist()
        where = first[0] if ndim == 1 else tuple(first)
        raise NonFiniteError(
            f"{name} has {int(bad.sum())} values that are NaN or infinite, the first at index {where}."
        )
    return array


def checked_labels(labels: ArrayLike, n: int, classes: int) -> NDArray[np.int64]:
    """int64 `[n]`, each in 0..classes-1. Raises InputError."""
    label = np.asarray(labels)
    if label.shape != (n,) or not np.issubdtype(label.dtype, np.integer):
        raise InputError(f"labels are {label.dtype} {label.shape}; integers of shape ({n},) are needed.")
    wrong = np.flatnonzero((label < 0) | (label >= classes))
    if len(wrong):
        raise InputError(f"label {label[wrong[0]]} at index {wrong[0]} is outside 0..{classes - 1}.")
    return label.astype(np.int64)


def with_labels(values: ArrayLike, labels: ArrayLike, name: str) -> tuple[Array, NDArray[np.int64]]:
    """`[n, K]` and its labels `[n]`, both checked; where `name` is "probs" the rows must be distributions."""
    array = finite(values, name, 2)
    if len(array) == 0 or array.shape[1] == 0:
        raise InputError(f"{name} of shape {array.shape} holds no samples.")
    label = checked_labels(labels, *array.shape)
    if name == "probs":
        off = np.flatnonzero((array.min(1) < 0) | (np.abs(array.sum(1) - 1) > 1e-3))
        if len(off):
            raise InputError(
                f"probs: row {off[0]} is no distribution (sum {array[off[0]].sum():.4g}, minimum "
                f"{array[off[0]].min():.4g}); give softmax outputs."
            )
    return array, label


def counts_of(weights: Weights, n: int, name: str = "weights") -> tuple[Array, bool]:
    """`[n, B]`, a column for each replicate, and whether the caller wants one float."""
    if weights is None:
        return np.ones((n, 1)), True
    array = np.asarray(weights, dtype=np.float64)
    if array.ndim not in (1, 2) or array.shape[-1] != n:
        raise InputError(f"{name} have shape {array.shape}; ({n},) or (B, {n}) is needed.")
    if not np.isfinite(array).all() or (array < 0).any():
        raise InputError(f"{name} must be finite and not negative.")
    return np.ascontiguousarray(np.atleast_2d(array).T), array.ndim == 1


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b != 0)


def softmax_and_log_sum(logits: Array) -> tuple[Array, Array]:
    """softmax `[n, K]` and log sum exp `[n]` of float64 logits, maximum subtracted first."""
    top = logits.max(1, keepdims=True)
    powers = np.exp(logits - top)
    total = powers.sum(1, keepdims=True)
    return powers / total, (np.log(total) + top)[:, 0]


def softmax(logits: ArrayLike) -> Array:
    """float64 `[n, K]`."""
    return softmax_and_log_sum(finite(logits, "logits", 2))[0]


def log_softmax(logits: ArrayLike) -> Array:
    """float64 `[n, K]`."""
    z = finite(logits, "logits", 2)
    return z - softmax_and_log_sum(z)[1][:, None]
