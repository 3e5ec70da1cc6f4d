"""Bootstrap over images for numbers that are functions of weighted sums."""

from __future__ import annotations

import numpy as np

from .intervals import Estimate

REPLICATES = 1000


def counts(n: int, draw: np.random.Generator) -> np.ndarray:
    """How often each of n images is drawn: float64 `[1 + REPLICATES, n]`, the first row is the sample itself."""
    drawn = draw.multinomial(n, np.full(n, 1 / n), size=REPLICATES)
    return np.concatenate([np.ones((1, n)), drawn])


def percentile(drawn: np.ndarray) -> Estimate:
    """The value and its 95 % percentile interval from `[1 + REPLICATES]` (or `[1 + REPLICATES, draws]` of a control:
    what draws differ in is in the interval, the value is their mean)."""
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    return Estimate(float(drawn[0].mean()), float(low), float(high))
