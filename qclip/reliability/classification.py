"""Zero-shot outputs of one model on one set, a few numbers an image, and the metrics as functions of weighted sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from .ood import scores
from .statistics import Statistic, Sums, mean_of, ratio

BINS = 15
ROWS = 4096  # images at a time: a [n, 1000] matrix of float64 is not needed whole
METRICS = ("top1", "top5", "balanced_accuracy", "ece", "ece_ts", "nll", "brier", "signed_gap", "mean_confidence")


@dataclasses.dataclass
class Outputs:
    """One value an image, each `[n]`. Label-free ones first; the others are empty for a set without labels."""

    predicted: np.ndarray  # int64; ties go to the lowest class
    ood: dict[str, np.ndarray]  # score name -> float64, higher = ID
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
            parts[name] = {k: v[rows] for k, v in part.items()} if isinstance(part, dict) else part[rows]
        return Outputs(**parts)


def read_out(
    vectors: np.ndarray,
    classifier: np.ndarray,
    scale: float,
    labels: np.ndarray | None = None,
    temperature: float | None = None,
) -> Outputs:
    """Unit image embeddings `[n, E]` and class embeddings `[K, E]` -> `Outputs`; logits are `scale` x cosine."""
    parts = []
    for start in range(0, len(vectors), ROWS):
        rows = slice(start, start + ROWS)
        parts.append(
            _read_out(vectors[rows] @ classifier.T, scale, None if labels is None else labels[rows], temperature)
        )
    return Outputs(**{f.name: _joined([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Outputs)})


def _joined(parts: list) -> Any:
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts)


def _read_out(cosines: np.ndarray, scale: float, labels: np.ndarray | None, temperature: float | None) -> Outputs:
    empty = np.empty(0)
    out = Outputs(cosines.argmax(1), scores(cosines, scale), *[empty.astype(np.int64)] * 2, *[empty] * 4)
    if labels is None:
        return out
    own = cosines[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(cosines.shape[1]) < labels[:, None]
    out.labels = labels
    out.rank = (cosines > own).sum(1) + ((cosines == own) & earlier).sum(1)
    probabilities, log_sum = _softmax(scale * cosines)
    out.confidence = probabilities.max(1)
    out.nll = log_sum - scale * own[:, 0]
    right = probabilities[np.arange(len(labels)), labels]
    out.brier = (probabilities**2).sum(1) - 2 * right + 1
    if temperature is None:
        out.confidence_ts = np.full(len(labels), np.nan)
    else:
        out.confidence_ts = _softmax(scale / temperature * cosines)[0].max(1)
    return out


def _softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top = logits.max(1, keepdims=True)
    powers = np.exp(logits - top)
    total = powers.sum(1, keepdims=True)
    return powers / total, (np.log(total) + top)[:, 0]


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Index of the bin ((b-1)/15, b/15]; the first also holds 0 (methods 3.1)."""
    edges = np.arange(BINS + 1) / BINS
    return np.clip(np.searchsorted(edges, confidence, "left") - 1, 0, BINS - 1)


def statistics(outputs: Outputs, classes: int, mask: np.ndarray) -> dict[str, Statistic]:
    """The metrics of `METRICS` that are defined, on the rows in `mask` (bool `[n]`)."""
    right = outputs.right.astype(np.float64)
    weight = mask.astype(np.float64)
    out = {
        "top1": mean_of(right, mask),
        "balanced_accuracy": Statistic(
            [Sums(right * weight, outputs.labels, classes), Sums(weight, outputs.labels, classes)], _balanced
        ),
        "ece": _ece(outputs.confidence, right, weight),
        "nll": mean_of(outputs.nll, mask),
        "brier": mean_of(outputs.brier, mask),
        "signed_gap": mean_of(outputs.confidence - right, mask),
        "mean_confidence": mean_of(outputs.confidence, mask),
    }
    if classes >= 5:
        out["top5"] = mean_of(outputs.rank < 5, mask)
    if not np.isnan(outputs.confidence_ts).any():
        out["ece_ts"] = _ece(outputs.confidence_ts, right, weight)
    return {name: out[name] for name in METRICS if name in out}


def _balanced(hits: np.ndarray, present: np.ndarray) -> np.ndarray:
    recall, there = ratio(hits, present), present > 0
    return ratio(np.where(there, recall, 0).sum(0), there.sum(0))


def _ece(confidence: np.ndarray, right: np.ndarray, weight: np.ndarray) -> Statistic:
    combine: Callable[..., np.ndarray] = lambda gaps, n: ratio(np.abs(gaps).sum(0), n[0])  # noqa: E731
    return Statistic(
        [Sums((confidence - right) * weight, bin_of(confidence), BINS), Sums(weight)], combine, skewed=True
    )


def reliability_diagram(outputs: Outputs) -> list[tuple[int, float, float, int]]:
    """(bin, accuracy, mean confidence, images) of every bin that holds an image."""
    bins = bin_of(outputs.confidence)
    count = np.bincount(bins, minlength=BINS)
    accuracy = np.bincount(bins, outputs.right, BINS)
    confidence = np.bincount(bins, outputs.confidence, BINS)
    return [(b, accuracy[b] / count[b], confidence[b] / count[b], int(count[b])) for b in range(BINS) if count[b]]
