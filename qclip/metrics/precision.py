"""Area under the precision-recall curve of ID among OOD, and of OOD among ID. It depends on their numbers."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from qclip.errors import InputError

from .arrays import Array, Weights, ratio
from .detection import EMPTY, Block, plain_detection
from .record import Metric

Positive = Literal["id", "ood"]
Rule = Literal["steps", "trapezoid"]


def area(block: Block, positive: Positive, rule: Rule) -> Array:
    """sum (R_k - R_{k-1}) P_k over distinct thresholds k (average precision), or with P averaged over both ends
    (the trapezoid of OpenOOD and pytorch-ood, whose curve begins at precision 1). Only scores of the positive side
    change the recall. `[R]`, NaN where a side is empty."""
    if positive == "id":  # accepted: scores at or above the threshold
        runs, mine, others = block.ranking.id_runs, block.id_sum, block.ood_sum
        after = mine[-1] - mine[runs.starts], others[-1] - others[runs.below]
        before = mine[-1] - mine[runs.ends], others[-1] - others[runs.up_to]
    else:  # accepted: scores at or below the threshold
        runs, mine, others = block.ranking.ood_runs, block.ood_sum, block.id_sum
        after = mine[runs.ends], others[runs.up_to]
        before = mine[runs.starts], others[runs.below]
    precision = _precision(*after)
    if rule == "trapezoid":
        precision = (precision + _precision(*before)) / 2
    total = mine[-1].astype(np.float64)
    value = ratio(np.einsum("tr,tr->r", precision, (after[0] - before[0]).astype(np.float64)), total)
    return np.where(others[-1] > 0, value, np.nan)


def _precision(hits: np.ndarray, others: np.ndarray) -> Array:
    """1 where nothing is accepted: where the curve begins."""
    both = hits + others
    return np.divide(hits, both, out=np.ones(both.shape), where=both != 0)


AUPR_IN = Metric("aupr_in", "AUPR, ID positive", 1, "share", 1, of=lambda b: area(b, "id", "steps"), undefined=EMPTY)
AUPR_OUT = Metric(
    "aupr_out", "AUPR, OOD positive", 1, "share", 1, of=lambda b: area(b, "ood", "steps"), undefined=EMPTY
)
AUPR_IN_TRAPEZOID = Metric(
    "aupr_in_trapezoid",
    "AUPR by the trapezoid, ID positive",
    1,
    "share",
    1,
    of=lambda b: area(b, "id", "trapezoid"),
    undefined=EMPTY,
)
AUPR_OUT_TRAPEZOID = Metric(
    "aupr_out_trapezoid",
    "AUPR by the trapezoid, OOD positive",
    1,
    "share",
    1,
    of=lambda b: area(b, "ood", "trapezoid"),
    undefined=EMPTY,
)


def aupr(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    positive: Positive = "id",
    rule: Rule = "steps",
    id_weights: Weights = None,
    ood_weights: Weights = None,
) -> float | Array:
    """Area under the precision-recall curve: average precision over distinct thresholds (`rule="steps"`), or the
    `trapezoid`. Scores are higher for ID; with `positive="ood"` low scores are what is found. nan where a side is
    empty."""
    if positive not in ("id", "ood") or rule not in ("steps", "trapezoid"):
        raise InputError(f"positive {positive!r} and rule {rule!r}; known: id, ood; steps, trapezoid.")
    return plain_detection(lambda block: area(block, positive, rule), id_scores, ood_scores, id_weights, ood_weights)
