"""One thing that was trained several times: means over its runs, whose intervals hold both the images and the runs.

Runs are paired, by the order in which they are named: the first of each was trained with the same seed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist

import numpy as np

from qclip.errors import InputError
from qclip.metrics import metric
from qclip.metrics.paired import holm
from qclip.results import Results, Row

from .statistics import LEVEL

Runs = Mapping[str, Sequence[str]]  # what was trained -> the models that are its runs
NODES = 200
NORMAL = 1e6  # degrees of freedom from which Student's distribution is the normal one


@dataclasses.dataclass(frozen=True)
class OverRuns:
    """A mean over runs, its 95 % interval and the two-sided p of 0; NaN where undefined."""

    value: float
    low: float
    high: float
    p: float


def over_runs(drawn: Sequence[np.ndarray], replicates: int, level: float = LEVEL) -> OverRuns:
    """Of each run `[value, replicates ...]`, on the same resamples of the images.

    The variance of the mean is that over resamples of the mean of the runs, and that of the runs around it over their
    number; its degrees of freedom are Satterthwaite's (1946): those of the runs where they differ, many where the
    images decide. Of one run there is no more than the images.
    """
    values = np.array([each[0] for each in drawn], np.float64)
    mean, k = float(values.mean()), len(values)
    resampled = np.mean([each[1 : 1 + replicates] for each in drawn], axis=0)
    resampled = resampled[np.isfinite(resampled)]
    if math.isnan(mean) or len(resampled) < 2:
        return OverRuns(mean, math.nan, math.nan, math.nan)
    images = float(resampled.var(ddof=1))
    runs = float(values.var(ddof=1)) / k if k > 1 else 0.0
    error = math.sqrt(images + runs)
    if error <= 1e-12 * abs(mean):  # nothing varies but last digits
        return OverRuns(mean, mean, mean, 1.0 if mean == 0 else math.nan)
    degrees = math.inf if runs == 0 else (images + runs) ** 2 / (runs**2 / (k - 1))
    half = student_quantile(level, degrees) * error
    return OverRuns(mean, mean - half, mean + half, student_p(mean / error, degrees))


def student_p(t: float, degrees: float) -> float:
    """Two-sided: the share of Student's distribution that lies farther from 0 than t."""
    if degrees >= NORMAL:
        return 2 * NormalDist().cdf(-abs(t))
    # With t = sqrt(v) tan(a) the density is that of cos(a)^(v-1), which is smooth and ends at pi/2.
    begin = math.atan(abs(t) / math.sqrt(degrees))
    end = min(math.pi / 2, begin + 40 / math.sqrt(degrees))
    nodes, weights = _nodes()
    angles = begin + (end - begin) * (nodes + 1) / 2
    log = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(math.pi)
    density = np.exp(log + (degrees - 1) * np.log(np.cos(angles)))
    return min(1.0, float(weights @ density) * (end - begin))


@functools.cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(NODES)


def student_quantile(level: float, degrees: float) -> float:
    """How far from 0 the central `level` of Student's distribution reaches."""
    low, high = 0.0, 1.0
    while student_p(high, degrees) > 1 - level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, degrees) > 1 - level else (low, middle)
    return (low + high) / 2


def checked_runs(runs: Runs | None, models: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Raises InputError for runs that are no models, or not of one number."""
    reference, *others = models
    found = {name: tuple(labels) for name, labels in (runs or {}).items()}
    for name, labels in found.items():
        if name in (reference, *others):
            raise InputError(f"{name!r} is a model and cannot be the name of several runs; name these otherwise")
        if odd := [label for label in labels if label not in others]:
            raise InputError(
                f"the run {odd[0]!r} of {name!r} is none of the models that are compared with {reference!r}"
            )
        if not labels or len(set(labels)) < len(labels):
            raise InputError(f"the runs of {name!r} are several models, each named once")
    if len({len(labels) for labels in found.values()}) > 1:
        raise InputError("runs are paired in their order, so all must be as many")
    return found


#: What a study is judged by: one family of tests.
JUDGED = ("top1", "balanced_accuracy", "nll", "nll_ts", "ece", "ece_ts", "auroc", "mean_top1")


def correct(results: Results) -> None:
    """Append `difference_holm_p`: the p of differences between means over runs, corrected by Holm over all that are
    `JUDGED`: on whole labelled sets, under corruptions by their mean, of OOD detection by MCM on the mean of the sets
    where there are several."""
    family = [row for row in results.where(metric="difference_p") if _judged(row)]
    if several := [row for row in family if row["role"] == "ood-mean"]:
        family = [row for row in family if row["at"] != "auroc"] + several
    tested = [row for row in family if row["value"] is not None]
    for row, p in zip(tested, holm([row["value"] for row in tested]), strict=True):
        results.add(**{**row, "metric": "difference_holm_p", "value": float(p)})
    if tested:
        names = ", ".join(metric(name).label for name in dict.fromkeys(str(row["at"]) for row in tested))
        results.note(f"differences of means over runs: Holm's family is {len(tested)} tests ({names})")


def _judged(row: Row) -> bool:
    if row["at"] not in JUDGED or row["subset"] != "all" or bool(row["corruption"]) != (row["at"] == "mean_top1"):
        return False
    return row["score"] == "mcm" if row["at"] == "auroc" else row["role"] in ("id", "corrupted")
