"""How near a model's outputs are to those of its reference, image by image."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .record import Metric

AGREEMENT = Metric("agreement", "Same prediction as the reference", 1, "share", 1)
COSINE_MEAN = Metric("cosine_mean", "Mean cosine", 1, digits=5)
COSINE_MIN = Metric("cosine_min", "Smallest cosine", 1)
FLIPS_LOST = Metric("flips_lost", "Lost: right to wrong", -1, "count", 0)
FLIPS_WON = Metric("flips_won", "Won: wrong to right", 1, "count", 0)
MCNEMAR_P = Metric("mcnemar_p", "McNemar, mid-p", digits=3)


@dataclasses.dataclass(frozen=True)
class Flips:
    """Paired right / wrong: `lost` were right in the reference only, `won` in the other only; mid-p of McNemar."""

    lost: int
    won: int
    p: float


def mcnemar(reference_right: np.ndarray, other_right: np.ndarray) -> Flips:
    """McNemar's test on bool `[n]` pairs: mid-p = 2 F(min) - f(min) of Binomial(lost + won, 1/2); 1 without flips."""
    lost = int(np.sum(reference_right & ~other_right))
    won = int(np.sum(~reference_right & other_right))
    n, least = lost + won, min(lost, won)
    if n == 0:
        return Flips(0, 0, 1.0)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(least + 1)
    ]
    chances = np.exp(logs)
    return Flips(lost, won, float(min(1.0, 2 * chances.sum() - chances[-1])))
