"""What a model made of a set: a few numbers per image, from which metrics are read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qclip.errors import InputError
from qclip.metrics import predictions
from qclip.metrics.predictions import LABELLED, Predictions
from qclip.metrics.resampled import Resampled

from .sample import Sample
from .scores import Score

ROWS = 4096  # images at a time: a [n, 1000] matrix of float64 is not needed whole


@dataclasses.dataclass
class Outputs(Predictions):
    """`Predictions`, and OOD scores. Of a set without labels there are only `predicted` and these.

    ood: score name -> float64 `[n]`, higher = ID. borrowed: the same of scores that learn, with what the reference
    model's learned.
    """

    ood: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    borrowed: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def take(self, rows: np.ndarray) -> Outputs:
        """The images at these positions. What is summed over the whole set is left out."""
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, part in parts.items():
            if isinstance(part, dict):
                parts[name] = {k: v[rows] for k, v in part.items()} if name != "totals" else {}
            elif isinstance(part, np.ndarray):
                parts[name] = part[rows]
        return Outputs(**parts)

    def digest(self) -> str:
        """sha256 (hex) of everything that metrics of labelled sets are read from."""
        found = hashlib.sha256()
        for field in dataclasses.fields(Predictions):
            part = getattr(self, field.name)
            for key, value in part.items() if isinstance(part, dict) else [("", part)]:
                for each in value if isinstance(value, list) else [value]:
                    array = np.ascontiguousarray(0 if each is None else each)
                    found.update(f"{field.name} {key} {array.dtype} {array.shape}".encode() + array.tobytes())
        return found.hexdigest()


def read_out(
    vectors: np.ndarray,
    classifier: np.ndarray,
    scale: float,
    labels: np.ndarray | None = None,
    temperatures: Mapping[str, float] | None = None,
    scores: Mapping[str, Score] | None = None,
    borrowed: Mapping[str, Score] | None = None,
    every_class: bool = True,
) -> Outputs:
    """Unit image embeddings `[n, E]` and class embeddings `[K, E]` -> `Outputs`; logits are `scale` x cosine. `scores`
    are fitted ones, `borrowed` those that were fitted on the reference model. every_class: with what classwise metrics
    need. Raises InputError where a score gives anything but finite numbers, one per image."""
    parts: list[Predictions] = []
    found: dict[str, list[dict[str, np.ndarray]]] = {"ood": [], "borrowed": []}
    for start in range(0, len(vectors), ROWS):
        rows = slice(start, start + ROWS)
        part = vectors[rows]
        sample = Sample(part, part @ classifier.T, scale, None if labels is None else labels[rows])
        for which, chosen in (("ood", scores), ("borrowed", borrowed)):
            found[which].append({name: scored(name, score, sample) for name, score in (chosen or {}).items()})
        parts.append(_read_out(sample, temperatures or {}, every_class))
    whole = predictions.joined(parts)
    joined: dict[str, Any] = {
        which: {name: np.concatenate([part[name] for part in each]) for name in each[0]}
        for which, each in found.items()
    }
    return Outputs(**{f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}, **joined)


def _read_out(sample: Sample, temperatures: Mapping[str, float], every_class: bool) -> Predictions:
    if sample.labels is not None:
        return predictions.read_block(sample.logits, sample.labels, temperatures, every_class)
    none, empty = np.empty(0, np.int64), np.empty(0)
    predicted = sample.cosines.argmax(1)
    return Predictions(sample.cosines.shape[1], predicted, none, none, empty, empty, empty, {}, {})


def scored(name: str, score: Score, sample: Sample) -> np.ndarray:
    values = np.asarray(score(sample), np.float64)
    if values.shape != (len(sample),) or not np.isfinite(values).all():
        bad = int(np.size(values) - np.isfinite(values).sum())
        raise InputError(
            f"score {name!r} gives {list(values.shape)} with {bad} NaN or infinite values for {len(sample)} images; "
            "it must give one finite number per image"
        )
    return values


def statistics(outputs: Outputs, mask: np.ndarray, names: Sequence[str] = LABELLED) -> dict[str, Resampled]:
    """The metrics of these names that are defined, on the rows in `mask` (bool `[n]`)."""
    return {name: each.within(mask) for name, each in predictions.definitions(outputs, names).items()}
