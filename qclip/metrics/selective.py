"""Selective prediction: what is still wrong when the least sure samples are left out."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from qclip.errors import InputError

from .arrays import Array, Weights, counts_of, ratio, with_labels
from .record import Metric
from .resampled import BLOCK


@dataclasses.dataclass(frozen=True)
class RiskCoverage:
    """Samples by descending confidence, and which of them are wrong. Counts are whole numbers.

    In a run of m equal confidences after k0 samples with E0 errors, g of them errors, the sum over the run
    sum_j (E0 + g j/m)/(k0 + j) is g + (E0 - g k0/m)(H(k0+m) - H(k0)), H harmonic numbers.
    """

    confidence: Array
    right: np.ndarray

    def on(self, counts: np.ndarray) -> Array:
        """The area under the curve: float64 `[resamples]` for counts `[n, resamples]`."""
        if (counts != np.rint(counts)).any():
            raise InputError("aurc counts samples: its weights must be whole numbers.")
        order = np.argsort(-self.confidence, kind="stable")
        starts = np.flatnonzero(np.concatenate([[True], np.diff(self.confidence[order]) != 0]))
        wrong = 1 - np.asarray(self.right, np.float64)[order, None]
        most = int(counts.sum(0, dtype=np.float64).max())
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, most + 1))])
        out = np.empty(counts.shape[1])
        for start in range(0, counts.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            w = counts[order, part].astype(np.float64)
            m, g = np.add.reduceat(w, starts, axis=0), np.add.reduceat(w * wrong, starts, axis=0)
            after, errors = np.cumsum(m, axis=0), np.cumsum(g, axis=0)
            before = after - m
            share = np.where(m > 0, g / np.maximum(m, 1), 0)
            steps = harmonic[after.astype(np.int64)] - harmonic[before.astype(np.int64)]
            out[part] = ratio((g + (errors - g - share * before) * steps).sum(0), after[-1])
        return out


AURC = Metric("aurc", "AURC", -1, digits=4, of=lambda o: RiskCoverage(o.confidence, o.right))


def aurc(probs: ArrayLike, labels: ArrayLike, weights: Weights = None) -> float | Array:
    """Area under the risk-coverage curve, confidence descending; ties give the mean over all their orders. `weights`
    are whole numbers."""
    p, y = with_labels(probs, labels, "probs")
    counts, single = counts_of(weights, len(y))
    values = RiskCoverage(p.max(1), p.argmax(1) == y).on(counts)
    return float(values[0]) if single else values
