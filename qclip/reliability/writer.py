"""Makes rows with intervals and paired differences of a metric's values on each resample."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qclip.metrics import metric
from qclip.metrics.predictions import LABELLED
from qclip.metrics.resampled import Resampled, evaluate_on, mean_of
from qclip.results import Results
from qclip.seeds import generator
from qclip.store import Store

from .outputs import Outputs, statistics
from .resampled import Kept, array_digest
from .runs import Runs, over_runs
from .statistics import BLOCKS, INTERVALS, Estimate, Resampling

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
    """Opens pages of one table of results. `models[0]` is the reference of the differences. `runs`: models that are
    runs of one thing; the first of these is compared with the others, too."""

    def __init__(
        self,
        results: Results,
        models: tuple[str, ...],
        seed: int,
        replicates: int = REPLICATES,
        store: Store | None = None,
        runs: Runs | None = None,
    ) -> None:
        self.results, self.models, self.seed, self.replicates = results, models, seed, replicates
        self.runs = runs or {}
        self.kept = Kept(store or Store(None), seed, replicates)
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

    def means(self, values: Mapping[str, np.ndarray], resampling: str | None = None) -> dict[str, np.ndarray]:
        """The means of values of each image `[n]`, on the sample and its bootstrap `[1 + replicates]`, or as they were
        kept. resampling: where they are not of this page's images, what seeds the resampling."""
        if not values:
            return {}
        name, n = self.digest if resampling is None else resampling, len(next(iter(values.values())))

        def compute() -> dict[str, np.ndarray]:
            counts = self.writer.resampling(name, n).bootstrap()
            drawn = evaluate_on([mean_of(each) for each in values.values()], counts)
            return dict(zip(values, drawn, strict=True))

        digest = array_digest(values)
        return self.writer.kept.fill(1 + self.writer.replicates, [], compute, means=digest, resampling=name, n=n)

    def estimate(self, model: str, name: str, drawn: np.ndarray, **fields: Any) -> None:
        """A row from a metric on every resample, with the interval that the metric's record asks for. Why a value is
        undefined is noted, and of a difference with its parts."""
        found: Estimate = INTERVALS[metric(name).interval](drawn, self.writer.replicates)
        if math.isnan(found.value) and not fields.get("reference"):
            where = " ".join(str(each) for each in (self.set, self.corruption, fields.get("at")) if each)
            why = metric(name).undefined or "its images do not tell it"
            self.writer.note(f"{where}: {name} of {model} is undefined: {why}")
        self.add(model, name, value=found.value, low=found.low, high=found.high, **fields)

    def estimates(self, name: str, drawn: Mapping[str, np.ndarray], **fields: Any) -> None:
        """Rows of a metric for all models, and of the paired differences to the first; for runs of one thing, of their
        means."""
        reference, *others = self.models
        for model in self.models:
            self.estimate(model, name, drawn[model], **fields)
        for model in others:
            self.estimate(model, name, drawn[model] - drawn[reference], reference=reference, **fields)
        judged = next(iter(self.writer.runs), None)
        for what, labels in self.writer.runs.items():
            mine = [drawn[label] for label in labels]
            self._over_runs(what, name, mine, **fields)
            self._over_runs(what, name, [each - drawn[reference] for each in mine], reference=reference, **fields)
            if judged is not None and what != judged:
                theirs = [drawn[label] - each for label, each in zip(self.writer.runs[judged], mine, strict=True)]
                self._over_runs(judged, name, theirs, reference=what, **fields)

    def _over_runs(self, what: str, name: str, drawn: Sequence[np.ndarray], **fields: Any) -> None:
        """The row of a mean over runs, and the p of a difference."""
        found = over_runs(drawn, self.writer.replicates)
        self.add(what, name, value=found.value, low=found.low, high=found.high, **fields)
        if fields.get("reference") and not fields.get("axis"):
            self.add(what, "difference_p", value=found.p, **fields, axis="metric", at=name)

    def draw(
        self,
        outputs: Mapping[str, Outputs],
        parts: Mapping[Part, np.ndarray] | None = None,
        names: Sequence[str] = LABELLED,
        more: Mapping[str, Callable[[Outputs], Resampled]] | None = None,
        **depends: Any,
    ) -> Drawn:
        """Metrics that are defined, on every resample of each part (bool `[n]`; default: all), or as they were kept.
        more: definitions of other metrics, whose numbers depend on `depends`, too."""
        assert self.n is not None
        parts = parts or {WHOLE: np.ones(self.n, bool)}
        wanted = {str(i): part for i, part in enumerate(parts)}
        masks = hashlib.sha256(b"".join(np.packbits(mask).tobytes() for mask in parts.values())).hexdigest()
        out: Drawn = {}
        for model in self.models:

            def compute(found: Outputs = outputs[model]) -> dict[str, np.ndarray]:
                each: dict[str, Resampled] = {}
                for i, part in wanted.items():
                    here = statistics(found, parts[part], names)
                    here |= {name: of(found).within(parts[part]) for name, of in (more or {}).items()}
                    each |= {f"{i} {name}": statistic for name, statistic in here.items()}
                return dict(zip(each, evaluate_on(list(each.values()), self.counts()), strict=True))

            columns = 1 + self.writer.replicates + min(BLOCKS, self.n)
            kept = self.writer.kept.fill(
                columns,
                [*names, *(more or {})],
                compute,
                outputs=outputs[model].digest(),
                masks=masks,
                parts=len(parts),
                resampling=self.digest,
                **depends,
            )
            out[model] = {(wanted[at], name): kept[key] for key in kept for at, name in [key.split(" ", 1)]}
        return out

    def labelled(self, drawn: Drawn, part: Part = WHOLE, names: Sequence[str] = LABELLED, **fields: Any) -> None:
        """The rows of one part of what `draw` gave; a metric that is undefined has a row without a value."""
        fields = part.fields | fields
        for name in names:
            if all((part, name) in drawn[model] for model in self.models):
                self.estimates(name, {model: drawn[model][part, name] for model in self.models}, **fields)
            else:
                for model in self.models:
                    self.add(model, name, value=None, **fields)
