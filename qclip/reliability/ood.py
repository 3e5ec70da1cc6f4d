"""Out-of-distribution scores, and the paired bootstrap of detection metrics. Higher = in distribution (ID)."""

from __future__ import annotations

import dataclasses

import numpy as np

from .statistics import BLOCK

TPR = 0.95


def scores(cosines: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """From cosines float64 `[n, K]` to the class embeddings and the exp'd logit scale:

    - `mcm`: max softmax of the bare cosines, tau = 1 (Ming et al. 2211.13445)
    - `maxlogit`: max cosine (any positive scale ranks alike)
    - `energy`: log-sum-exp of scale * cosine, T = 1 (Liu et al. 2010.03759)
    """
    top = cosines.max(1)
    shifted = cosines - top[:, None]
    return {
        "mcm": 1 / np.exp(shifted).sum(1),
        "maxlogit": top,
        "energy": scale * top + np.log(np.exp(scale * shifted).sum(1)),
    }


@dataclasses.dataclass
class Detection:
    """Each metric on each resample, `[1 + replicates]`; element 0 is the sample itself."""

    auroc: np.ndarray
    fpr95: np.ndarray  # ID positive: share of OOD accepted where 95 % of ID is
    fpr95_ood_positive: np.ndarray  # share of ID rejected where 95 % of OOD is caught


def detection(
    id_scores: np.ndarray, ood_scores: np.ndarray, id_counts: np.ndarray, ood_counts: np.ndarray
) -> Detection:
    """Detection metrics on resamples: scores float64 `[n_id]`, `[n_ood]`, counts `[n_id, R]`, `[n_ood, R]`, where a
    column of each belongs to one resample (ID and OOD are drawn separately).

    AUROC counts ties half (Mann-Whitney). FPR: the threshold is the largest score at which at least 95 % of the
    positives are accepted, no interpolation (methods 3.2).
    """
    id_order, ood_order = np.argsort(id_scores, kind="stable"), np.argsort(ood_scores, kind="stable")
    ids, oods = id_scores[id_order], ood_scores[ood_order]
    below, up_to = np.searchsorted(ids, oods, "left"), np.searchsorted(ids, oods, "right")
    tied = bool(np.any(below != up_to))
    resamples = id_counts.shape[1]
    out = Detection(*(np.empty(resamples) for _ in range(3)))
    for start in range(0, resamples, BLOCK):
        block = slice(start, min(start + BLOCK, resamples))
        id_weights, ood_weights = id_counts[id_order, block], ood_counts[ood_order, block]
        id_sum, ood_sum = _running(id_weights), _running(ood_weights)
        n_id, n_ood = id_sum[-1].astype(np.float64), ood_sum[-1].astype(np.float64)
        # weight of ID below each OOD score; ties count half
        beaten = id_sum[below].astype(np.float64)
        if tied:
            beaten = (beaten + id_sum[up_to]) / 2
        lost = np.einsum("or,or->r", beaten, ood_weights.astype(np.float64))
        out.auroc[block] = 1 - lost / (n_id * n_ood)
        columns = np.arange(id_sum.shape[1])
        threshold = ids[_last_at_most(id_sum, n_id - _needed(n_id))]
        accepted = n_ood - ood_sum[np.searchsorted(oods, threshold, "left"), columns]
        out.fpr95[block] = accepted / n_ood
        threshold = oods[_first_at_least(ood_sum, _needed(n_ood))]
        out.fpr95_ood_positive[block] = id_sum[np.searchsorted(ids, threshold, "right"), columns] / n_id
    return out


def _needed(n: np.ndarray) -> np.ndarray:
    return np.ceil(TPR * n - 1e-9 * n)  # 0.95 * 20 is 19, whatever the float says


def _running(weights: np.ndarray) -> np.ndarray:
    """Row k: the weight of the first k samples; int32 `[n + 1, R]`."""
    out = np.zeros((len(weights) + 1, weights.shape[1]), np.int32)
    np.cumsum(weights, axis=0, out=out[1:])
    return out


def _first_at_least(running: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each column, the first sample whose running weight, itself included, reaches `wanted`."""
    low = np.zeros(running.shape[1], np.int64)
    high = np.full(running.shape[1], len(running) - 2)
    columns = np.arange(running.shape[1])
    while np.any(low < high):
        middle = (low + high) // 2
        reached = running[middle + 1, columns] >= wanted
        high = np.where(reached, middle, high)
        low = np.where(reached, low, middle + 1)
    return low


def _last_at_most(running: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """For each column, the last sample before which at most `allowed` weight lies (it has weight itself)."""
    return _first_at_least(running, allowed + 1)
