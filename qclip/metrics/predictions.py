"""A few numbers per sample, read from logits in one pass, from which all metrics of a labelled set are made."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qclip.errors import InputError

from . import classwise
from .accuracy import ranks
from .arrays import Array, checked_labels, finite
from .brier import squared_error
from .record import metric
from .resampled import Resampled, evaluate_on

ENTRIES = 1 << 18  # logits at a time: temporary arrays of 2 MB

# What is said of every set, subset and group; and what is said of whole sets beside it.
LABELLED = ("top1", "top5", "balanced_accuracy", "ece", "ece_ts", "nll", "brier", "signed_gap", "mean_confidence")
DETAILED = (
    "ece_adaptive",
    "ece_classwise",
    "ece_classwise_likely",
    "ece_max",
    "ece_max_n",
    "ece_l2",
    "ece_l2_square",
    "overconfidence",
    "underconfidence",
    "nll_ts",
    "ece_proxy",
    "nll_proxy",
    "brier_top",
    "brier_rel",
    "brier_res",
    "brier_unc",
    "brier_wbv",
    "brier_wbc",
    "aurc",
    "eaurc",
    "eaurc_approximate",
)


@dataclasses.dataclass
class Predictions:
    """One value per sample, each `[n]`; ties go to the lowest class.

    confidence_at, nll_at: the same with logits divided by a temperature, by its name ("ts": fitted on a dev set,
    "proxy": tuned on captions). probs `[n, K]` where there are few classes, else None; totals: sums of the classwise
    metrics, which need them all.
    """

    classes: int
    predicted: np.ndarray  # int64
    labels: np.ndarray  # int64
    rank: np.ndarray  # int64: classes that come before the label
    confidence: Array  # largest softmax probability
    nll: Array
    brier: Array  # sum over classes, 0..2
    confidence_at: dict[str, Array]
    nll_at: dict[str, Array]
    probs: Array | None = None
    totals: classwise.Totals = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def right(self) -> np.ndarray:
        return self.rank == 0


def read(
    logits: ArrayLike,
    labels: ArrayLike,
    temperatures: Mapping[str, float] | None = None,
    every_class: bool = True,
) -> Predictions:
    """Predictions of logits `[n, K]` for labels `[n]`, in blocks of rows: what it needs beside the logits does not
    grow with K. every_class: with what the classwise metrics need. Raises InputError, NonFiniteError."""
    z = np.asarray(logits)
    if z.ndim != 2 or not z.size:
        raise InputError(f"logits of shape {z.shape} hold no samples; [n, K] are needed.")
    target = checked_labels(labels, *z.shape)
    rows = max(1, ENTRIES // z.shape[1])
    parts = [slice(start, start + rows) for start in range(0, len(z), rows)]

    def one(part: slice) -> Predictions:
        block = z[part].astype(np.float64)  # a copy: it is overwritten
        if not np.isfinite(block).all():
            finite(z, "logits", 2)
        return read_block(block, target[part], temperatures or {}, every_class)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return joined(list(pool.map(one, parts)))


def read_block(
    logits: Array, labels: np.ndarray, temperatures: Mapping[str, float], every_class: bool = True
) -> Predictions:
    """Predictions of finite float64 logits `[m, K]`, which are overwritten."""
    n, classes = logits.shape
    rows = np.arange(n)
    rank, predicted = ranks(logits, labels), logits.argmax(1)
    logits -= logits[rows, predicted][:, None]
    own = logits[rows, labels]
    confidence_at, nll_at = {}, {}
    for name, temperature in temperatures.items():
        total = np.exp(logits / temperature).sum(1)
        confidence_at[name], nll_at[name] = 1 / total, np.log(total) - own / temperature
    probs = np.exp(logits, out=logits)
    total = probs.sum(1)
    probs /= total[:, None]
    return Predictions(
        classes,
        predicted,
        labels,
        rank,
        confidence=probs[rows, predicted],
        nll=np.log(total) - own,
        brier=squared_error(probs, labels),
        confidence_at=confidence_at,
        nll_at=nll_at,
        probs=probs if every_class and classes <= classwise.KEPT else None,
        totals=classwise.totals(probs, labels) if every_class and classes > classwise.KEPT else {},
    )


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Parts of one set as a whole."""

    def both(name: str) -> Any:
        each = [getattr(part, name) for part in parts]
        if isinstance(each[0], dict):
            return {key: np.concatenate([part[key] for part in each]) for key in each[0]}
        return np.concatenate(each)

    names = ("predicted", "labels", "rank", "confidence", "nll", "brier", "confidence_at", "nll_at")
    probs = None if parts[0].probs is None else both("probs")
    totals = classwise.added([part.totals for part in parts])
    return Predictions(parts[0].classes, **{name: both(name) for name in names}, probs=probs, totals=totals)


def definitions(predictions: Predictions, names: Sequence[str]) -> dict[str, Resampled]:
    """The metrics of these names that are defined for a set of so many classes, as functions of counts."""
    records = [metric(name) for name in names]
    found = {each.name: each.of(predictions) for each in records if each.of and each.classes <= predictions.classes}
    return {name: each for name, each in found.items() if each is not None}


def measure(
    logits: ArrayLike, labels: ArrayLike, temperature: float | None = None, names: Sequence[str] | None = None
) -> dict[str, float]:
    """Every metric (default: `LABELLED` and `DETAILED`) of logits `[n, K]`, from one pass over them; NaN where it is
    undefined. temperature: fitted on other samples, for `ece_ts` and `nll_ts`. Raises InputError, NonFiniteError."""
    names = (*LABELLED, *DETAILED) if names is None else names
    every_class = any(name in classwise.DEFINITIONS for name in names)
    predictions = read(logits, labels, {} if temperature is None else {"ts": temperature}, every_class)
    found = definitions(predictions, names)
    values = evaluate_on(list(found.values()), np.ones((len(predictions), 1), np.uint8))
    known = {name: float(value[0]) for name, value in zip(found, values, strict=True)}
    return {name: known.get(name, np.nan) for name in names}
