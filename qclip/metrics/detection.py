"""Detection of other classes from a score. Scores are higher for ID."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from qclip.errors import InputError

from .arrays import Array, Weights, counts_of, finite, ratio
from .record import Metric
from .resampled import BLOCK, first, running

TPR = 0.95
SLACK = 1e-9  # 0.95 * 20 is 19, whatever the float says


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of equal scores of one side, ascending: where each starts and ends, and how many scores of the other side
    are lower, and how many at most equal."""

    starts: np.ndarray
    ends: np.ndarray
    below: np.ndarray
    up_to: np.ndarray


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    starts = np.flatnonzero(np.concatenate([[True], np.diff(values) != 0])) if len(values) else np.empty(0, np.int64)
    return starts, np.append(starts[1:], len(values)) if len(values) else starts


class Ranking:
    """ID and OOD scores in order, from which every detection metric is read on many resamples at once."""

    def __init__(self, id_scores: np.ndarray, ood_scores: np.ndarray) -> None:
        self.id_order, self.ood_order = (np.argsort(s, kind="stable") for s in (id_scores, ood_scores))
        self.ids, self.oods = id_scores[self.id_order], ood_scores[self.ood_order]
        self.below, self.up_to = (np.searchsorted(self.ids, self.oods, side) for side in ("left", "right"))
        self.tied = bool(np.any(self.below != self.up_to))

    @functools.cached_property
    def id_runs(self) -> Runs:
        """Distinct ID scores from the lowest, and how many OOD scores lie below each, and up to each."""
        starts, ends = _runs(self.ids)
        below, up_to = (np.searchsorted(self.oods, self.ids[starts], side) for side in ("left", "right"))
        return Runs(starts, ends, below, up_to)

    @functools.cached_property
    def ood_runs(self) -> Runs:
        """The same of distinct OOD scores among ID scores."""
        starts, ends = _runs(self.oods)
        return Runs(starts, ends, self.below[starts], self.up_to[starts])

    def on(self, metrics: Sequence[Callable[[Block], Array]], id_counts: np.ndarray, ood_counts: np.ndarray) -> list:
        """Each metric `[R]` for counts `[n_id, R]` and `[n_ood, R]`: a column of each belongs to one resample (ID and
        OOD are drawn separately); a side with one column serves all of the other's."""
        resamples = max(id_counts.shape[1], ood_counts.shape[1])
        out = [np.empty(resamples) for _ in metrics]
        for start in range(0, resamples, BLOCK):
            part = slice(start, min(start + BLOCK, resamples))
            columns = part.stop - part.start
            ids, oods = (
                np.broadcast_to(c, (len(c), columns)) if c.shape[1] == 1 else c[:, part]
                for c in (id_counts, ood_counts)
            )
            block = Block(self, ids[self.id_order], oods[self.ood_order])
            for values, metric in zip(out, metrics, strict=True):
                values[part] = metric(block)
        return out


@dataclasses.dataclass
class Block:
    """A few resamples of a ranking: how often each score, ascending, occurs in each of them."""

    ranking: Ranking
    id_weights: np.ndarray
    ood_weights: np.ndarray

    @functools.cached_property
    def id_sum(self) -> np.ndarray:
        """Row k: the weight of the k lowest scores; `[n + 1, R]`."""
        return running(self.id_weights)

    @functools.cached_property
    def ood_sum(self) -> np.ndarray:
        return running(self.ood_weights)

    @functools.cached_property
    def n_id(self) -> Array:
        return self.id_sum[-1].astype(np.float64)

    @functools.cached_property
    def n_ood(self) -> Array:
        return self.ood_sum[-1].astype(np.float64)

    def area(self) -> Array:
        """P(ID score > OOD score), ties counting one half (Mann-Whitney)."""
        ranking = self.ranking
        beaten = self.id_sum[ranking.below].astype(np.float64)  # weight of ID below each OOD score
        if ranking.tied:
            beaten = (beaten + self.id_sum[ranking.up_to]) / 2
        lost = np.einsum("or,or->r", beaten, self.ood_weights.astype(np.float64))
        return 1 - ratio(lost, self.n_id * self.n_ood)

    def accepted_ood(self, tpr: float = TPR) -> Array:
        """Share of OOD at or above the largest threshold that at least `tpr` of ID reaches; no interpolation."""
        if not len(self.ranking.ids):
            return np.full(len(self.n_id), np.nan)
        spare = self.n_id - tpr * self.n_id * (1 - SLACK)  # of ID, this weight may lie below the threshold
        threshold = self.ranking.ids[first(lambda weight: weight > spare, self.id_sum)]
        columns = np.arange(len(threshold))
        kept = self.n_ood - self.ood_sum[np.searchsorted(self.ranking.oods, threshold, "left"), columns]
        return np.where(self.n_id > 0, ratio(kept, self.n_ood), np.nan)

    def rejected_id(self, tpr: float = TPR) -> Array:
        """Share of ID at or below the lowest threshold under which at least `tpr` of OOD lies."""
        if not len(self.ranking.oods):
            return np.full(len(self.n_ood), np.nan)
        needed = tpr * self.n_ood * (1 - SLACK)
        threshold = self.ranking.oods[first(lambda weight: weight >= needed, self.ood_sum)]
        columns = np.arange(len(threshold))
        lost = self.id_sum[np.searchsorted(self.ranking.ids, threshold, "right"), columns]
        return np.where(self.n_ood > 0, ratio(lost.astype(np.float64), self.n_id), np.nan)

    def id_share_at(self, threshold: float) -> Array:
        """Share of ID at or above a threshold: its true positive rate."""
        lost = self.id_sum[np.searchsorted(self.ranking.ids, threshold, "left")]
        return ratio(self.n_id - lost, self.n_id)

    def ood_share_at(self, threshold: float) -> Array:
        """Share of OOD at or above a threshold: its false positive rate."""
        lost = self.ood_sum[np.searchsorted(self.ranking.oods, threshold, "left")]
        return ratio(self.n_ood - lost, self.n_ood)


EMPTY = "a side is empty"
AUROC = Metric("auroc", "AUROC", 1, "share", 1, of=Block.area, undefined=EMPTY)
FPR95 = Metric("fpr95", "FPR95", -1, "share", 1, of=Block.accepted_ood, undefined=EMPTY)
FPR95_OOD_POSITIVE = Metric(
    "fpr95_ood_positive", "FPR95, OOD positive", -1, "share", 1, of=Block.rejected_id, undefined=EMPTY
)
TPR_TRANSFERRED = Metric("tpr_transferred", "ID accepted at the reference's threshold", 1, "share", 1, undefined=EMPTY)
FPR_TRANSFERRED = Metric(
    "fpr_transferred", "OOD accepted at the reference's threshold", -1, "share", 1, undefined=EMPTY
)


def plain_detection(
    metric: Callable[[Block], Array],
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    id_weights: Weights,
    ood_weights: Weights,
) -> float | Array:
    inside, outside = finite(id_scores, "id_scores", 1), finite(ood_scores, "ood_scores", 1)
    if not len(inside) and not len(outside):
        raise InputError("id_scores and ood_scores are both empty.")
    first, single = counts_of(id_weights, len(inside), "id_weights")
    second, also_single = counts_of(ood_weights, len(outside), "ood_weights")
    replicates = first.shape[1], second.shape[1]
    if replicates[0] != replicates[1] and 1 not in replicates:
        raise InputError(f"id_weights hold {replicates[0]} replicates, ood_weights {replicates[1]}.")
    (values,) = Ranking(inside, outside).on([metric], first, second)
    return float(values[0]) if single and also_single else values


def auroc(
    id_scores: ArrayLike, ood_scores: ArrayLike, id_weights: Weights = None, ood_weights: Weights = None
) -> float | Array:
    """P(ID score > OOD score), ties counting one half; nan where a side is empty."""
    return plain_detection(Block.area, id_scores, ood_scores, id_weights, ood_weights)


def fpr_at_tpr(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    tpr: float = TPR,
    positive: Literal["id", "ood"] = "id",
    id_weights: Weights = None,
    ood_weights: Weights = None,
) -> float | Array:
    """False positive rate at the largest threshold whose true positive rate is at least `tpr`; no interpolation.

    `positive="id"`: share of OOD that is accepted when 95 % of ID is (MCM and most CLIP papers). `positive="ood"`:
    share of ID that is rejected when 95 % of OOD is caught (OpenOOD 1.5). nan where a side is empty.
    """
    if not 0 < tpr <= 1:
        raise InputError(f"tpr is {tpr}; a share over 0, at most 1, is needed.")
    if positive not in ("id", "ood"):
        raise InputError(f"positive is {positive!r}; known: id, ood.")
    rate = Block.accepted_ood if positive == "id" else Block.rejected_id
    return plain_detection(functools.partial(rate, tpr=tpr), id_scores, ood_scores, id_weights, ood_weights)


def roc_curve_points(id_scores: ArrayLike, ood_scores: ArrayLike, fpr: ArrayLike | None = None) -> tuple[Array, Array]:
    """ROC curve with ID positive: (fpr, tpr) at every distinct threshold from (0, 0) to (1, 1).

    With `fpr` the curve is read at these rates: the highest TPR that a threshold reaches with at most this FPR; no
    interpolation. Raises InputError where a side is empty.
    """
    inside, outside = finite(id_scores, "id_scores", 1), finite(ood_scores, "ood_scores", 1)
    if not len(inside) or not len(outside):
        raise InputError("a ROC curve needs ID and OOD scores.")
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    rates = [
        np.concatenate([[0.0], (len(s) - np.searchsorted(np.sort(s), thresholds, "left")) / len(s)])
        for s in (outside, inside)
    ]
    if fpr is None:
        return rates[0], rates[1]
    wanted = np.asarray(fpr, np.float64)
    return wanted, rates[1][np.searchsorted(rates[0], wanted + 1e-12, "right") - 1]


def threshold_at(scores: ArrayLike, share: float) -> float:
    """The largest score that at least `share` of the samples reach: a threshold that is then used on other samples.
    Raises InputError without scores, or for a share outside (0, 1]."""
    values = np.sort(finite(scores, "scores", 1))
    if not len(values) or not 0 < share <= 1:
        raise InputError(f"a threshold needs scores, and a share over 0 and at most 1; got {len(values)} and {share}.")
    spare = len(values) - share * len(values) * (1 - SLACK)
    return float(values[min(int(np.floor(spare)), len(values) - 1)])
