"""Controls: what a residual of the same size does that is independent of the weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from ..seeds import generator

MIN_SEEDS = 8


def white_directions(shape: tuple[int, int], name: str, seeds: int = MIN_SEEDS, seed: int = 0) -> Iterator[Tensor]:
    """Gaussian matrices float64 `[N, K]` whose rows have norm 1: times the row norms of a residual, a white residual
    of equal norm per output channel."""
    for k in range(seeds):
        drawn = torch.from_numpy(generator(seed, f"{name} {k}").standard_normal(shape))
        yield drawn / drawn.norm(dim=1, keepdim=True)


def prediction_interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Mean, low, high: where one more draw of a control would fall (Student's t; float `[seeds]`, at least 2)."""
    n, mean = len(draws), float(np.mean(draws))
    reach = student_t((1 + level) / 2, n - 1) * float(np.std(draws, ddof=1)) * math.sqrt(1 + 1 / n)
    return mean, mean - reach, mean + reach


def student_t(p: float, freedom: int) -> float:
    """Quantile of Student's t by Cornish-Fisher expansion (Abramowitz & Stegun 26.7.5); 4e-4 off at 7 degrees."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (k + 1) for k, term in enumerate(terms))
