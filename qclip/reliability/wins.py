"""Joint wins: variants that improve on the reference in several metrics at once, and how many would by chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from .statistics import LEVEL


@dataclasses.dataclass(frozen=True)
class Wins:
    """count: variants whose every difference is an improvement. expected, low, high: joint wins where nothing
    differs, mean and 95 % band. p: the chance of at least `count` of them."""

    count: int
    expected: float
    low: float
    high: float
    p: float


def joint_wins(gains: Mapping[str, np.ndarray], replicates: int) -> Wins:
    """Of variants by name: gains `[metrics, 1 + replicates]`, paired differences to one reference turned so that
    positive is better, the first column that of the sample itself.

    Chance is the bootstrap around its own estimate, d* - d: nothing differs, but all correlations stay, of the metrics
    and of the variants, which share their reference. Independent coins would give 1/2 to the power of the metrics; what
    is correlated gives more. Replicates in which a metric is undefined are left out; without any all but the count is
    nan.
    """
    values = np.stack([each[:, : 1 + replicates] for each in gains.values()])  # [variants, metrics, 1 + replicates]
    sample, drawn = values[..., :1], values[..., 1:]
    count = int((sample[..., 0] > 0).all(1).sum())
    drawn = drawn[..., ~np.isnan(drawn).any((0, 1))]
    if not drawn.shape[-1] or np.isnan(sample).any():
        return Wins(count, np.nan, np.nan, np.nan, np.nan)
    null = ((drawn - sample) > 0).all(1).sum(0)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(null, [tail, 1 - tail])
    p = (1 + int((null >= count).sum())) / (1 + len(null))
    return Wins(count, float(null.mean()), float(low), float(high), p)
