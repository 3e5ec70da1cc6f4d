"""Joint wins: variants that improve on the reference in several metrics at once, and how many would by chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qclip.metrics import metric

from .statistics import INTERVALS, LEVEL
from .writer import WHOLE, Drawn, Page


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


def write_wins(page: Page, id_drawn: Drawn, auroc: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Rows of `wins`, how many of them are clear of chance in each metric, and how many chance alone would give.

    id_drawn: `top1` and `ece` of the ID set; auroc: by score and model. The rows belong to no model: `n` is the number
    of variants, `reference` what they are compared with.
    """
    reference, *variants = page.models
    for score, by_model in auroc.items():
        gains, clear = {}, 0
        for model in variants:
            better = []
            for name, side in (("top1", 1), ("ece", -1)):
                better.append((name, side * (id_drawn[model][WHOLE, name] - id_drawn[reference][WHOLE, name])))
            better.append(("auroc", by_model[model] - by_model[reference]))
            ends = [INTERVALS[metric(name).interval](each, page.writer.replicates).low for name, each in better]
            clear += all(low > 0 for low in ends)
            gains[model] = np.stack([each[: 1 + page.writer.replicates] for _, each in better])
        found = joint_wins(gains, page.writer.replicates)
        common: dict[str, Any] = {"score": score, "reference": reference, "n": len(variants)}
        page.add("", "wins", value=found.count, **common)
        page.add("", "wins_clear", value=clear, **common)
        page.add("", "wins_expected", value=found.expected, low=found.low, high=found.high, **common)
        page.add("", "wins_p", value=found.p, **common)
