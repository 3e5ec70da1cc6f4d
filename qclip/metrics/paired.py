"""Paired tests: McNemar's on right and wrong, DeLong's on AUROC, Wilcoxon's over models, and Holm's correction."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from qclip.errors import InputError

from .arrays import Array, finite
from .record import Metric

EXACT_PAIRS = 25  # up to here Wilcoxon's distribution is counted, beyond it is normal
FEWEST_PAIRS = 6  # fewer can never reach .05 two-sided: the least p of n pairs is 2^(1 - n)

FLIPS_LOST = Metric("flips_lost", "Lost: right to wrong", -1, "count", 0)
FLIPS_WON = Metric("flips_won", "Won: wrong to right", 1, "count", 0)
FLIPS_ALL = Metric("flips_all", "Predictions that changed", -1, "count", 0)
MCNEMAR_P = Metric("mcnemar_p", "McNemar, mid-p", digits=3)
MCNEMAR_EXACT_P = Metric("mcnemar_exact_p", "McNemar, exact", digits=3)
DIFFERENCE_P = Metric("difference_p", "Difference of means over runs, p", digits=3, undefined="nothing varies")
DIFFERENCE_HOLM_P = Metric("difference_holm_p", "Difference of means over runs, p by Holm", digits=3)
DELONG_P = Metric(
    "delong_p", "DeLong", digits=3, undefined="a side has fewer than two images, or a difference has no variance"
)


def _over_models(name: str, label: str) -> tuple[Metric, Metric]:
    few = f"fewer than {FEWEST_PAIRS} models"
    plain = Metric(f"{name}_wilcoxon_p", f"{label}: Wilcoxon over models", digits=3, undefined=few)
    return plain, dataclasses.replace(plain, name=f"{name}_wilcoxon_holm_p", label=f"{plain.label}, Holm")


TOP1_WILCOXON_P, TOP1_WILCOXON_HOLM_P = _over_models("top1", "Top-1 accuracy")
ECE_WILCOXON_P, ECE_WILCOXON_HOLM_P = _over_models("ece", "ECE")
NLL_WILCOXON_P, NLL_WILCOXON_HOLM_P = _over_models("nll", "NLL")
AUROC_WILCOXON_P, AUROC_WILCOXON_HOLM_P = _over_models("auroc", "AUROC")


@dataclasses.dataclass(frozen=True)
class Flips:
    """Paired right / wrong: `lost` were right in the reference only, `won` in the other only; McNemar's p, mid-p and
    exact."""

    lost: int
    won: int
    p: float
    exact_p: float


def mcnemar(reference_right: np.ndarray, other_right: np.ndarray) -> Flips:
    """McNemar's test on bool `[n]` pairs, two-sided: exact p = min(1, 2 F(least)), mid-p = 2 F(least) - f(least), F and
    f of Binomial(lost + won, 1/2), least the fewer of the two; 1 without flips."""
    lost = int(np.sum(reference_right & ~other_right))
    won = int(np.sum(~reference_right & other_right))
    n, least = lost + won, min(lost, won)
    if n == 0:
        return Flips(0, 0, 1.0, 1.0)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(least + 1)
    ]
    chances = np.exp(logs)
    twice = 2 * float(chances.sum())
    return Flips(lost, won, min(1.0, twice - float(chances[-1])), min(1.0, twice))


@dataclasses.dataclass(frozen=True)
class DeLong:
    """AUROC of each of M models on the same images `[M]`, and the covariance of these estimates `[M, M]`."""

    auroc: Array
    covariance: Array

    def p(self, model: int, reference: int = 0) -> float:
        """Two-sided p of equal AUROC. Without variance 1 where both are equal, else nan: nothing can be said of two
        that differ by the same everywhere."""
        gap = float(self.auroc[model] - self.auroc[reference])
        s = self.covariance
        variance = float(s[model, model] + s[reference, reference] - 2 * s[model, reference])
        if math.isnan(gap) or math.isnan(variance):
            return math.nan
        if variance <= 1e-15 * float(s[model, model] + s[reference, reference]):
            return 1.0 if abs(gap) < 1e-12 else math.nan
        return 2 * NormalDist().cdf(-abs(gap) / math.sqrt(variance))


def midranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    order = np.sort(values)
    return (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right") + 1) / 2


def delong(id_scores: ArrayLike, ood_scores: ArrayLike) -> DeLong:
    """Scores `[M, n]` of M models on the same ID and OOD images, higher = ID (DeLong et al. 1988, by ranks as Sun & Xu
    2014). The covariance is nan where a side has fewer than two images. Raises InputError, NonFiniteError."""
    inside, outside = finite(id_scores, "id_scores", 2), finite(ood_scores, "ood_scores", 2)
    if len(inside) != len(outside) or not inside.size or not outside.size:
        raise InputError(f"scores of shapes {inside.shape} and {outside.shape} are not those of the same models.")
    n, m = inside.shape[1], outside.shape[1]
    together = np.stack([midranks(np.concatenate(pair)) for pair in zip(inside, outside, strict=True)])
    of_ids = (together[:, :n] - np.stack([midranks(s) for s in inside])) / m  # share of OOD below each ID score
    of_oods = 1 - (together[:, n:] - np.stack([midranks(s) for s in outside])) / n
    if min(n, m) < 2:
        return DeLong(of_ids.mean(1), np.full((len(inside), len(inside)), np.nan))
    covariance = sum(np.atleast_2d(np.cov(part)) / part.shape[1] for part in (of_ids, of_oods))
    return DeLong(of_ids.mean(1), np.asarray(covariance))


def wilcoxon(differences: ArrayLike) -> float:
    """Two-sided p of the signed-rank test on paired differences `[n]`, zeros by Pratt: ranked, then left out. Counted
    over all signs up to 25 pairs, with ties as they are; beyond by the normal approximation with the variance of the
    ranks that are there. nan for fewer than `FEWEST_PAIRS` pairs, which could never reach .05; 1 where all are zero."""
    d = finite(differences, "differences", 1)
    if len(d) < FEWEST_PAIRS:
        return math.nan
    ranks = midranks(np.abs(d))[d != 0]
    if not len(ranks):
        return 1.0
    positive = float(ranks[d[d != 0] > 0].sum())
    if len(d) > EXACT_PAIRS:
        spread = math.sqrt(float((ranks**2).sum()) / 4)
        return 2 * NormalDist().cdf(-abs(positive - float(ranks.sum()) / 2) / spread)
    halves = np.rint(2 * ranks).astype(np.int64)  # midranks are whole or half
    ways = np.zeros(int(halves.sum()) + 1)
    ways[0] = 1
    for each in halves:
        ways[each:] = ways[each:] + ways[: len(ways) - each].copy()
    at = round(2 * positive)
    tail = min(ways[: at + 1].sum(), ways[at:].sum()) / 2.0 ** len(ranks)
    return min(1.0, 2 * float(tail))


def holm(p: ArrayLike) -> Array:
    """Holm's adjusted p of a family of tests `[m]`: max over j <= i of min(1, (m - j + 1) p_(j)), in the order given.
    Those that are nan were not tested: they stay nan and do not count. State the family with the result."""
    given = np.asarray(p, np.float64)
    out = np.full(given.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(given))
    order = tested[np.argsort(given[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    out[order] = np.maximum.accumulate(np.minimum(1, factors * given[order])) if len(order) else []
    return out
