"""Makes rows with intervals and paired differences of a metric's values on each resample."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qclip.metrics import metric
from qclip.metrics.predictions import LABELLED
from qclip.metrics.resampled import Resampled, evaluate_on
from qclip.results import Results
from qclip.seeds import generator

from .outputs import Outputs, statistics
from .statistics import INTERVALS, Estimate, Resampling

REPLICATES = 1000
KEPT = 256 << 20  # bytes of resamplings that are held: drawing them again takes longer than reading them


@dataclasses.dataclass(frozen=True)
class Part:
    """Images of a set: all, a named subset of them, or a group."""

    subset: str = ""
    group: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        return {"axis": "group", "at": self.group} if self.group else {"subset": self.subset}


WHOLE = Part()
Drawn = dict[str, dict[tuple[Part, str], np.ndarray]]  # model -> (part, metric) -> [1 + replicates + jackknife]


class Writer:
    """Opens pages of one table of results. `models[0]` is the reference of the differences."""

    def __init__(self, results: Results, models: tuple[str, ...], seed: int, replicates: int = REPLICATES) -> None:
        self.results, self.models, self.seed, self.replicates = results, models, seed, replicates
        self._resamplings: dict[tuple[str, int], Resampling] = {}

    def page(self, set: str, role: str, n: int | None = None, digest: str = "", corruption: str = "") -> Page:
        """For the rows of one set. n: images; digest: seeds its resampling, equal for all models."""
        return Page(self, set, role, n, digest, corruption)

    def note(self, text: str) -> None:
        self.results.note(text)

    def resampling(self, name: str, n: int) -> Resampling:
        """Counts for n images, drawn from the run's seed and `name`: the same whoever asks."""
        key = name, n
        if key not in self._resamplings:
            drawn = Resampling.draw(n, generator(self.seed, name), self.replicates)
            while self._resamplings and self._bytes() + drawn.counts.nbytes > KEPT:
                del self._resamplings[next(iter(self._resamplings))]
            self._resamplings[key] = drawn
        return self._resamplings[key]

    def _bytes(self) -> int:
        return sum(each.counts.nbytes for each in self._resamplings.values())


@dataclasses.dataclass(frozen=True)
class Page:
    """Writes the rows of one set, or of a corruption of it."""

    writer: Writer
    set: str
    role: str
    n: int | None
    digest: str
    corruption: str

    @property
    def models(self) -> tuple[str, ...]:
        return self.writer.models

    def add(self, model: str, name: str, **fields: Any) -> None:
        """One row of the metric `name`."""
        self.writer.results.add(**self._common(model, name) | fields)

    def curve(self, model: str, name: str, points: Mapping[str, Iterable[float | None]], **fields: Any) -> None:
        self.writer.results.add_curve(points, **self._common(model, name) | fields)

    def _common(self, model: str, name: str) -> dict[str, Any]:
        own = {"model": model, "metric": name, "set": self.set, "role": self.role, "corruption": self.corruption}
        described = self.writer.results.meta.get("models", {}).get(model, {})
        return described | own | {"seed": self.writer.seed, "n": self.n}

    def counts(self) -> np.ndarray:
        """Counts `[n, 1 + replicates + jackknife]` of the set's images: the sample itself, then its resamples."""
        assert self.n is not None
        return self.writer.resampling(self.digest, self.n).counts

    def estimate(self, model: str, name: str, drawn: np.ndarray, **fields: Any) -> None:
        """A row from a metric on every resample, with the interval that the metric's record asks for."""
        found: Estimate = INTERVALS[metric(name).interval](drawn, self.writer.replicates)
        self.add(model, name, value=found.value, low=found.low, high=found.high, **fields)

    def estimates(self, name: str, drawn: Mapping[str, np.ndarray], **fields: Any) -> None:
        """Rows of a metric for all models, and of the paired differences to the first."""
        reference, *others = self.models
        for model in self.models:
            self.estimate(model, name, drawn[model], **fields)
        for model in others:
            self.estimate(model, name, drawn[model] - drawn[reference], reference=reference, **fields)

    def draw(self, outputs: Mapping[str, Outputs], parts: Mapping[Part, np.ndarray] | None = None) -> Drawn:
        """Every metric of `LABELLED` that is defined, on every resample of each part (bool `[n]`; default: all)."""
        assert self.n is not None
        wanted: dict[tuple[str, Part, str], Resampled] = {}
        for model in self.models:
            for part, mask in (parts or {WHOLE: np.ones(self.n, bool)}).items():
                for name, statistic in statistics(outputs[model], mask).items():
                    wanted[model, part, name] = statistic
        values = evaluate_on(list(wanted.values()), self.counts())
        out: Drawn = {model: {} for model in self.models}
        for (model, part, name), value in zip(wanted, values, strict=True):
            out[model][part, name] = value
        return out

    def labelled(self, drawn: Drawn, part: Part = WHOLE, **fields: Any) -> None:
        """The rows of one part of what `draw` gave; a metric that is undefined has a row without a value."""
        fields = part.fields | fields
        for name in LABELLED:
            if all((part, name) in drawn[model] for model in self.models):
                self.estimates(name, {model: drawn[model][part, name] for model in self.models}, **fields)
            else:
                for model in self.models:
                    self.add(model, name, value=None, **fields)
