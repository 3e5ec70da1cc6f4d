"""One number that sharpens or flattens all probabilities, fitted where the loss is convex in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from qclip.errors import InputError

from .arrays import Array, Weights, counts_of, finite, with_labels
from .record import Metric

ROWS = 1 << 17  # logits at a time: temporary arrays of 1 MB stay in the cache
STEPS = 200  # Newton needs 4 to 10; bisection alone would need about 60

TEMPERATURE = Metric("temperature", "Temperature", 0, digits=2)
TEMPERATURE_PROXY = Metric("temperature_proxy", "Temperature, tuned on captions", 0, digits=2)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """`value` T (logits are divided by it); `flag` says why T is not an ordinary optimum, "" where it is."""

    value: float
    flag: str = ""

    def __float__(self) -> float:
        return self.value


def fit_temperature(logits: ArrayLike, labels: ArrayLike, weights: Weights = None) -> Temperature:
    """T that minimizes the NLL of softmax(logits / T): safeguarded Newton in 1/T, where the loss is convex.

    Flags: "constant" (nothing to fit, T = 1), "no positive optimum" (T = inf), "separable" (every label is strictly
    the largest logit: the loss has no minimum, T is the smallest that is allowed).
    """
    z, y = with_labels(logits, labels, "logits")
    counts, single = counts_of(weights, len(y))
    if not single:
        raise InputError("fit_temperature takes one set of weights, not several replicates.")
    w = counts[:, 0]
    if not w.sum() > 0:
        raise InputError("all weights are zero: there is nothing to fit a temperature to.")
    if not w.all():
        z, y, w = z[w > 0], y[w > 0], w[w > 0]
    return _fitted([_Loss(z, y, w / w.sum())])


def fit_logit_scale(similarity: ArrayLike) -> Temperature:
    """T that minimizes the contrastive loss of `similarity / T`, `[N, N]` logits of N images with their N captions:
    the mean of the cross-entropies of rows and of columns, whose labels are the diagonal. It depends on N."""
    z = finite(similarity, "similarity", 2)
    if not len(z) or z.shape[0] != z.shape[1]:
        raise InputError(f"similarity has shape {z.shape}; N images by their N captions are needed.")
    y, w = np.arange(len(z)), np.full(len(z), 0.5 / len(z))
    return _fitted([_Loss(z, y, w), _Loss(z.T, y, w)])


class _Loss:
    """sum_i w_i (log sum exp(beta z_i) - beta z_iy), of logits whose rows are shifted to a maximum of 0."""

    def __init__(self, z: Array, y: np.ndarray, w: Array) -> None:
        self.z, self.y, self.w = z, y, w
        self.own = z[np.arange(len(y)), y] - z.max(1)
        rows = max(1, ROWS // z.shape[1])
        self.parts = [slice(start, start + rows) for start in range(0, len(z), rows)]

    def shifted(self, part: slice) -> Array:
        z = self.z[part]
        return z - z.max(1, keepdims=True)

    def over(self, of: Callable[[slice, Array], float]) -> float:
        return float(sum(of(part, self.shifted(part)) for part in self.parts))

    def slopes(self, beta: float) -> np.ndarray:
        """First and second derivative."""
        first, second = 0.0, 0.0
        for part in self.parts:
            z, w = self.shifted(part), self.w[part]
            p = np.exp(beta * z)
            total = p.sum(1)
            mean = np.einsum("nk,nk->n", p, z) / total
            p *= z
            first += float(w @ (mean - self.own[part]))
            second += float(w @ (np.einsum("nk,nk->n", p, z) / total - mean**2))
        return np.array([first, second])

    def separable(self) -> bool:
        """Whether every label's logit is the only largest."""
        if (self.own < 0).any():
            return False
        return self.over(lambda _, z: float(((z >= 0).sum(1) > 1).any())) == 0


def _fitted(losses: list[_Loss]) -> Temperature:
    size = losses[0].z.size
    if losses[0].z.shape[1] == 1 or not any(each.over(lambda _, z: float((z < 0).any())) for each in losses):
        return Temperature(1.0, "constant")

    def slopes(beta: float) -> tuple[float, float]:
        slope, curve = sum(each.slopes(beta) for each in losses)  # type: ignore[misc]
        return float(slope), float(curve)

    if slopes(0.0)[0] >= 0:
        return Temperature(float("inf"), "no positive optimum")
    mean = losses[0].over(lambda _, z: float(z.sum())) / size
    spread = np.sqrt(losses[0].over(lambda _, z: float(((z - mean) ** 2).sum())) / size)
    cap = 1e4 / float(spread)
    if all(each.separable() for each in losses):
        return Temperature(1 / cap, "separable")
    low, high = 0.0, 1.0
    while slopes(high)[0] <= 0:
        low, high = high, 2 * high
        if high > cap:
            return Temperature(1 / cap, "separable")
    beta, enough = min(max(1.0, low), high), -1e-12 * mean
    for _ in range(STEPS):
        slope, curve = slopes(beta)
        if abs(slope) <= enough:
            break
        low, high = (beta, high) if slope < 0 else (low, beta)
        step = beta - slope / curve if curve > 1e-300 else np.nan
        beta = step if low < step < high else (low + high) / 2
    return Temperature(float(1 / beta))
