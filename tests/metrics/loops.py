"""Metrics by plain loops over samples, summed without rounding: slow, and hard to get wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np


def edges(bins: int) -> list[tuple[float, float]]:
    return [(b / bins, (b + 1) / bins) for b in range(bins)]


def width_bins(values: Sequence[float], bins: int = 15) -> list[list[int]]:
    """Positions in each bin (a, b]; the first also holds 0."""
    return [[i for i, v in enumerate(values) if low < v <= high or (low == 0 and v == 0)] for low, high in edges(bins)]


def mass_bins(values: Sequence[float], bins: int = 15) -> list[list[int]]:
    """Equal numbers in ascending order; who is equal to the last of a bin joins it."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    out, at, goal = [], 0, 0
    for part in np.array_split(np.arange(len(values)), bins):
        goal += len(part)
        end = max(at, goal)
        while 0 < end < len(order) and values[order[end]] == values[order[end - 1]]:
            end += 1
        out.append(order[at:end])
        at = end
    return out


def gap(confidence: Sequence[float], hit: Sequence[float], inside: Sequence[int]) -> float:
    """conf - acc of a bin."""
    return math.fsum(confidence[i] - hit[i] for i in inside) / len(inside)


def ece(confidence, hit, bins=15, norm="l1", binned=width_bins) -> float:
    found = [b for b in binned(confidence, bins) if b]
    gaps = [(len(b) / len(hit), abs(gap(confidence, hit, b))) for b in found]
    if norm == "max":
        return max(d for _, d in gaps)
    return math.fsum(w * d for w, d in gaps) if norm == "l1" else math.sqrt(math.fsum(w * d * d for w, d in gaps))


def debiased(confidence, hit, bins=15, binned=mass_bins) -> float:
    total = 0.0
    for inside in binned(confidence, bins):
        if len(inside) > 1:
            accuracy = math.fsum(hit[i] for i in inside) / len(inside)
            spread = accuracy * (1 - accuracy) / (len(inside) - 1)
            total += len(inside) / len(hit) * (gap(confidence, hit, inside) ** 2 - spread)
    return total


def classwise(probs, labels, likely=False, bins=15) -> float:
    found = []
    for k in range(probs.shape[1]):
        rows = [i for i in range(len(labels)) if not likely or probs[i, k] > 1 / probs.shape[1]]
        if rows:
            found.append(ece([float(probs[i, k]) for i in rows], [float(labels[i] == k) for i in rows], bins))
    return math.fsum(found) / len(found)


def aurc(confidence, hit) -> float:
    """The mean over all orders of ties, by the expected number of errors among the first of a run."""
    total, before, errors = 0.0, 0, 0.0
    order = sorted(range(len(hit)), key=lambda i: -confidence[i])
    for _, run in itertools.groupby(order, key=lambda i: confidence[i]):
        members = list(run)
        wrong = sum(1 - hit[i] for i in members)
        for j in range(1, len(members) + 1):
            total += (errors + wrong * j / len(members)) / (before + j)
        before, errors = before + len(members), errors + wrong
    return total / len(hit)


def average_precision(positives, negatives, rule="steps") -> float:
    """Over every distinct threshold, accepting at or above."""
    area, recall, precision = 0.0, 0.0, 1.0
    for t in sorted({*positives, *negatives}, reverse=True):
        hits, wrong = sum(p >= t for p in positives), sum(n >= t for n in negatives)
        now, there = hits / (hits + wrong), hits / len(positives)
        area += (there - recall) * (now if rule == "steps" else (now + precision) / 2)
        recall, precision = there, now
    return area


def auroc(ids, oods) -> float:
    return sum((a > b) + (a == b) / 2 for a in ids for b in oods) / (len(ids) * len(oods))


def fpr(positives, negatives, tpr=0.95) -> float:
    """At the ceil(tpr n)-th best positive."""
    needed = math.ceil(round(tpr * len(positives), 9))
    threshold = sorted(positives, reverse=True)[needed - 1]
    return sum(n >= threshold for n in negatives) / len(negatives)


def brier_parts(f, a, bins=15) -> dict[str, float]:
    n, base = len(a), math.fsum(a) / len(a)
    out = dict.fromkeys(("reliability", "resolution", "within_variance", "within_covariance"), 0.0)
    for inside in width_bins(f, bins):
        if not inside:
            continue
        conf, acc = (math.fsum(v[i] for i in inside) / len(inside) for v in (f, a))
        out["reliability"] += len(inside) / n * (conf - acc) ** 2
        out["resolution"] += len(inside) / n * (acc - base) ** 2
        out["within_variance"] += math.fsum((f[i] - conf) ** 2 for i in inside) / n
        out["within_covariance"] += 2 * math.fsum((f[i] - conf) * (a[i] - acc) for i in inside) / n
    return out | {"uncertainty": base * (1 - base)}
