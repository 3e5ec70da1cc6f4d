"""What a model made of a set: a few numbers per image, from which metrics are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qclip.errors import InputError
from qclip.metrics import metric
from qclip.metrics.accuracy import ranks
from qclip.metrics.arrays import softmax_and_log_sum
from qclip.metrics.calibration import negative_log_likelihood, squared_error
from qclip.metrics.resampled import Statistic

from .sample import Sample
from .scores import Score

ROWS = 4096  # images at a time: a [n, 1000] matrix of float64 is not needed whole
LABELLED = ("top1", "top5", "balanced_accuracy", "ece", "ece_ts", "nll", "brier", "signed_gap", "mean_confidence")


@dataclasses.dataclass
class Outputs:
    """One value per image, each `[n]`. Label-free ones first; the others are empty for a set without labels."""

    classes: int
    predicted: np.ndarray  # int64; ties go to the lowest class
    ood: dict[str, np.ndarray]  # score name -> float64, higher = ID
    borrowed: dict[str, np.ndarray]  # the same of scores that learn, with what the reference model's learned
    labels: np.ndarray  # int64
    rank: np.ndarray  # int64: classes that come before the label
    confidence: np.ndarray  # float64: largest softmax probability
    confidence_ts: np.ndarray  # the same at the temperature fitted on the dev set; NaN without one
    nll: np.ndarray
    brier: np.ndarray  # sum over classes, 0..2

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def right(self) -> np.ndarray:
        return self.rank == 0

    def take(self, rows: np.ndarray) -> Outputs:
        """The images at these positions."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, part in parts.items():
            if isinstance(part, dict):
                parts[name] = {k: v[rows] for k, v in part.items()}
            elif isinstance(part, np.ndarray):
                parts[name] = part[rows]
        return Outputs(**parts)


def read_out(
    vectors: np.ndarray,
    classifier: np.ndarray,
    scale: float,
    labels: np.ndarray | None = None,
    temperature: float | None = None,
    scores: Mapping[str, Score] | None = None,
    borrowed: Mapping[str, Score] | None = None,
) -> Outputs:
    """Unit image embeddings `[n, E]` and class embeddings `[K, E]` -> `Outputs`; logits are `scale` x cosine. `scores`
    are fitted ones, `borrowed` those that were fitted on the reference model. Raises InputError where a score gives
    anything but finite numbers, one per image."""
    parts = []
    for start in range(0, len(vectors), ROWS):
        rows = slice(start, start + ROWS)
        part = vectors[rows]
        sample = Sample(part, part @ classifier.T, scale, None if labels is None else labels[rows])
        parts.append(_read_out(sample, temperature, scores or {}, borrowed or {}))
    return Outputs(**{f.name: _joined([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Outputs)})


def _joined(parts: list) -> Any:
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else parts[0]


def _read_out(
    sample: Sample, temperature: float | None, scores: Mapping[str, Score], borrowed: Mapping[str, Score]
) -> Outputs:
    none, empty = np.empty(0, np.int64), np.empty(0)
    cosines, labels = sample.cosines, sample.labels
    out = Outputs(
        classes=cosines.shape[1],
        predicted=cosines.argmax(1),
        ood={name: _scored(name, score, sample) for name, score in scores.items()},
        borrowed={name: _scored(name, score, sample) for name, score in borrowed.items()},
        labels=none,
        rank=none,
        confidence=empty,
        confidence_ts=empty,
        nll=empty,
        brier=empty,
    )
    if labels is None:
        return out
    logits = sample.logits
    probabilities, log_sum = softmax_and_log_sum(logits)
    out.labels = labels
    out.rank = ranks(cosines, labels)
    out.confidence = probabilities.max(1)
    out.nll = negative_log_likelihood(logits, log_sum, labels)
    out.brier = squared_error(probabilities, labels)
    if temperature is None:
        out.confidence_ts = np.full(len(labels), np.nan)
    else:
        out.confidence_ts = softmax_and_log_sum(sample.scale / temperature * cosines)[0].max(1)
    return out


def _scored(name: str, score: Score, sample: Sample) -> np.ndarray:
    values = np.asarray(score(sample), np.float64)
    if values.shape != (len(sample),) or not np.isfinite(values).all():
        bad = int(np.size(values) - np.isfinite(values).sum())
        raise InputError(
            f"score {name!r} gives {list(values.shape)} with {bad} NaN or infinite values for {len(sample)} images; "
            "it must give one finite number per image"
        )
    return values


def statistics(outputs: Outputs, mask: np.ndarray) -> dict[str, Statistic]:
    """The metrics of `LABELLED` that are defined, on the rows in `mask` (bool `[n]`)."""
    found = {name: definition(outputs) for name in LABELLED if (definition := metric(name).of) is not None}
    return {name: statistic.within(mask) for name, statistic in found.items() if statistic is not None}
