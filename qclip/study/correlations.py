"""Whether variants whose spectra changed more also changed more in reliability: rank correlations over the variants of
a model, with p by permutation, corrected for how many were looked at."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qclip.metrics.paired import holm, midranks
from qclip.seeds import generator

from .cells import Grid
from .found import DEFAULT, Asked, find
from .store import StudyStore
from .variants import FLOAT

MEASURES = ("level", "shape")  # of a tower's gain on the float basis (`qclip.spectral`)
FEWEST = 5  # variants: with four no order reaches .05
DRAWS = 9999
EXACT = 7  # up to so many variants all orders are looked at


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's rho over `n` variants, its two-sided p by permutation, and that corrected by Holm over all that were
    looked at. NaN where there are fewer than `FEWEST` variants or one side is constant."""

    model: str
    evaluation: str
    measure: str
    tower: str
    metric: str
    set: str
    n: int
    rho: float
    p: float
    holm_p: float = math.nan


def correlations(
    grid: Grid, store: StudyStore, metrics: Iterable[str] = DEFAULT, score: str | None = None, seed: int = 0
) -> list[Correlation]:
    """Of every spectral measure with every difference to float on sets as they are; empty where the plan measured no
    spectra. Raises InputError where nothing was measured."""
    metrics = tuple(metrics)
    return over(find(grid, store, Asked((*metrics, *MEASURES), score)).lines, metrics, seed)


def over(lines: Iterable[Mapping[str, Any]], metrics: Iterable[str], seed: int = 0) -> list[Correlation]:
    """`correlations` of lines that `found.joined` gives."""
    metrics = tuple(metrics)
    measures: dict[tuple[str, str, str, str], dict[str, float]] = {}
    changes: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for line in lines:
        if line["variant"] == FLOAT or line["corruption"]:
            continue
        if line["role"] == "tower" and line["metric"] in MEASURES:
            key = line["model"], line["evaluation"], line["metric"], line["set"]
            measures.setdefault(key, {})[line["variant"]] = line["value"]
        elif line["metric"] in metrics and line["difference"] is not None:
            key = line["model"], line["evaluation"], line["metric"], line["set"]
            changes.setdefault(key, {})[line["variant"]] = line["difference"]
    found = []
    for (model, evaluation, measure, tower), x in measures.items():
        for (other, also, name, where), y in changes.items():
            if (model, evaluation) == (other, also):
                both = [each for each in x if each in y and not (math.isnan(x[each]) or math.isnan(y[each]))]
                values = np.array([x[each] for each in both]), np.array([y[each] for each in both])
                rho, p = spearman(*values, seed=seed)
                found.append(Correlation(model, evaluation, measure, tower, name, where, len(both), rho, p))
    corrected = holm([each.p for each in found])
    return [dataclasses.replace(each, holm_p=float(p)) for each, p in zip(found, corrected, strict=True)]


def spearman(x: np.ndarray, y: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Spearman's rank correlation of `[n]` and `[n]`, ties at their midranks, and its two-sided p: the share of orders
    of one side (all up to `EXACT`, else the given one and `DRAWS` random ones) with as large a correlation."""
    n = len(x)
    if n < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan, math.nan
    a, b = midranks(x), midranks(y)
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    rho = float(a @ b / n)
    if n <= EXACT:
        orders = np.array(list(itertools.permutations(range(n))))
    else:
        draw = generator(seed, "spearman")
        orders = np.stack([np.arange(n), *(draw.permutation(n) for _ in range(DRAWS))])
    drawn = a[orders] @ b / n
    return rho, float(np.mean(np.abs(drawn) >= abs(rho) - 1e-12))
