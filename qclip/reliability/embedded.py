"""Embeds every condition that some measurement wants, once per model, and keeps what was read from the embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from qclip import metrics
from qclip.errors import InputError, NonFiniteError
from qclip.results import Results
from qclip.seeds import generator

from .embed import Embedder, View
from .fitted import FittedScores
from .kept import Embedded, Stage
from .outputs import ROWS, Outputs, read_out
from .request import Condition, EvalSet, Request
from .sample import Sample, unit

FIRST = ("proxy", "dev", "train")  # temperatures and scores are fitted before anything is read
PAIRS = 2048  # images and captions of which the logit scale is tuned; what it takes grows with the square


class Embeddings:
    """`outputs`, `vectors`, `indices` and `seconds` of each condition by model label; `temperatures` by model label."""

    def __init__(self, embedder: Embedder, request: Request, results: Results) -> None:
        self._embedder, self._request, self._results = embedder, request, results
        self.temperatures: dict[str, float | None] = dict.fromkeys(embedder.views)
        self.proxies: dict[str, float] = {}  # temperatures tuned on captions
        self.failed: dict[str, str] = {}  # models whose embeddings are not finite, and where; nothing is given of them
        self._later: list[Callable[[], None]] = []  # what is read when scores are fitted
        self._scores = FittedScores(embedder, request, results)
        self._classifiers: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, np.ndarray]] = {}
        self._embedded: dict[tuple, dict[str, Embedded]] = {}
        self._wanted: dict[tuple, Condition] = {}
        self._outputs: dict[tuple, dict[str, Outputs]] = {}
        self._vectors: dict[tuple, dict[str, np.ndarray]] = {}

    def share(self, wanted: Iterable[Condition], part: int, parts: int) -> None:
        """Embed one of so many parts of all conditions into the store, and read nothing."""
        once = _once(wanted)
        self._learn_from_classes(once.values())
        self._embedder.share(map(self._stage, once.values()), part, parts)

    def prepare(self, wanted: Iterable[Condition]) -> None:
        """Embed and read all conditions, each once."""
        once = _once(wanted)
        self._wanted = once
        first = [condition for condition in once.values() if condition.set.role in FIRST]
        self._learn_from_classes(once.values())
        self._embedder.expect(map(self._stage, (*first, *(c for c in once.values() if c not in first))))
        for condition in first:
            self._read(condition)
        for read in self._later:
            read()
        self._later.clear()  # they hold embeddings
        for condition in once.values():
            if condition not in first:
                self._read(condition)
        if self._request.of("id", "shift") and all(value is None for value in self.temperatures.values()):
            self._results.note("temperature and ece_ts are undefined: no dev set was given to fit the temperature on")

    @property
    def conditions(self) -> list[Condition]:
        """Those that were read, but for sets on which something was fitted."""
        return [condition for key, condition in self._wanted.items() if self._outputs.get(key)]

    def _learn_from_classes(self, wanted: Iterable[Condition]) -> None:
        """Fit the scores that need no images, those of patches among them: they are read as images are embedded."""
        if any(condition.scores for condition in wanted):
            for label, classes in self.classifier(self._request.of("id")[0]).items():
                self._scores.learn(label, classes)

    def outputs(self, condition: Condition) -> dict[str, Outputs]:
        """What was read from the embeddings of a condition that was wanted."""
        return self._sound(self._outputs[condition.key])

    def vectors(self, condition: Condition) -> dict[str, np.ndarray]:
        """Unit embeddings float64 `[m, E]` of a condition that was wanted with `vectors`."""
        return {
            label: unit(raw, f"image embeddings of {label!r} on {condition.name}")
            for label, raw in self._sound(self._vectors[condition.key]).items()
        }

    def samples(self, condition: Condition, model: str) -> Iterator[Sample]:
        """What a model made of a condition that was wanted with `vectors`, some thousand images at a time."""
        classifier = self.classifier(condition.set)[model]
        scale = self._embedder.views[model].encoders.logit_scale
        raw, labels = self._vectors[condition.key][model], condition.set.labels
        labels = None if labels is None else labels[self.indices(condition)]
        for start in range(0, len(raw), ROWS):
            rows = slice(start, start + ROWS)
            vectors = unit(raw[rows], f"image embeddings of {model!r} on {condition.name}")
            yield Sample(vectors, vectors @ classifier.T, scale, None if labels is None else labels[rows])

    def indices(self, condition: Condition) -> np.ndarray:
        """Positions of the images that could be read, int64 `[m]`."""
        return next(iter(self._embedded[condition.key].values())).indices

    def seconds(self, condition: Condition) -> dict[str, float]:
        """What embedding took when it was done, which may have been in an earlier run."""
        return {label: found.seconds for label, found in self._sound(self._embedded[condition.key]).items()}

    def classifier(self, of: EvalSet) -> dict[str, np.ndarray]:
        """Unit class embeddings `[K, E]` of a set's classes."""
        key = of.classes, of.templates
        if of.role == "id":
            self._results.meta.setdefault("templates", {})[of.name] = list(of.templates)
        if key not in self._classifiers:
            self._classifiers[key] = self._of_each(
                lambda view: self._embedder.classifier(view, of.classes, of.templates)
            )
        return self._classifiers[key]

    def texts(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Unit embeddings `[len(texts), E]` of texts as they are, by model label."""
        return self._of_each(lambda view: self._embedder.texts(view, texts))

    def _sound(self, by_label: dict[str, Any]) -> dict[str, Any]:
        return {label: found for label, found in by_label.items() if label not in self.failed}

    def _of_each(self, compute: Callable[[View], np.ndarray]) -> dict[str, np.ndarray]:
        """What every model gives whose numbers are finite. One whose are not is left out from here on; the reference
        cannot be: NonFiniteError."""
        out = {}
        for label, view in self._sound(self._embedder.views).items():
            try:
                out[label] = compute(view)
            except NonFiniteError as why:
                if label == next(iter(self._embedder.views)):
                    raise
                self.failed[label] = str(why)
        return out

    def _stage(self, condition: Condition) -> Stage:
        local = self._scores.local if condition.scores else {}
        return Stage(condition.set.data, condition.corruption, condition.severity, local)

    def _read(self, condition: Condition) -> None:
        found = self._embedder.images(self._stage(condition))
        self._embedded[condition.key] = found
        bad = next(iter(found.values())).unreadable
        if bad and not condition.corruption:
            shown = "; ".join(why for _, why in bad[:5]) + (" ..." if len(bad) > 5 else "")
            self._results.note(
                f"{condition.set.name}: {len(bad)} of {len(condition.set.data)} images cannot be read and are left "
                f"out: {shown}"
            )
        labels = None if condition.set.labels is None else condition.set.labels[self.indices(condition)]
        classifier = self.classifier(condition.set) if condition.set.classes else {}
        outputs: dict[str, Outputs] = {}
        self._outputs[condition.key] = outputs
        units = self._of_each(lambda view: _units(view.label, found[view.label], condition))
        for label, vectors in units.items():
            if condition.set.role == "proxy":
                self._tune(condition.set, label, vectors, self.indices(condition))
            if not classifier:
                continue
            scale = self._embedder.views[label].encoders.logit_scale
            if condition.set.role in FIRST:
                sample = Sample(vectors, vectors @ classifier[label].T, scale, labels)
                self._fit(condition.set, label, sample)
            if condition.set.role == "train":
                continue

            def read(label: str = label, vectors: np.ndarray = vectors, scale: float = scale) -> None:
                scores, borrowed = {}, {}
                if condition.scores:
                    scores, borrowed = self._scores.own(label), self._scores.borrowed(label)
                at = self._temperatures(label)
                whole = not condition.corruption  # classwise metrics are not taken of these many conditions
                outputs[label] = read_out(vectors, classifier[label], scale, labels, at, scores, borrowed, whole)
                outputs[label].ood |= found[label].local

            if condition.set.role == "dev":
                self._later.append(read)
            else:
                read()
        if condition.vectors:
            self._vectors[condition.key] = {label: each.vectors for label, each in found.items()}
        for each in found.values():
            each.vectors = np.empty((0, 0), np.float32)  # large, and wanted no more

    def _fit(self, of: EvalSet, label: str, sample: Sample) -> None:
        if of.role == "train":
            self._scores.learn(label, self.classifier(self._request.of("id")[0])[label], sample)
            if any(of.data.digest == other.data.digest for other in self._request.sets if other is not of):
                self._results.note(f"{of.name} has another role, too: scores that learned from its images know them")
            return
        fitted = metrics.fit_temperature(sample.logits, sample.labels if sample.labels is not None else [])
        self.temperatures[label] = fitted.value
        if fitted.flag:
            self._results.note(f"{label}: the temperature from {of.name} is no ordinary optimum: {fitted.flag}")
        self._results.note(f"temperatures were fitted on {of.name} ({len(of.data)} images), one for each model")
        if any(of.data.digest == other.data.digest for other in self._request.of("id", "shift")):
            self._results.note(f"{of.name} is evaluated too: its ece_ts is of the images that fitted the temperature")

    def _temperatures(self, label: str) -> dict[str, float]:
        """By the name under which confidences at them are kept."""
        found = {"ts": self.temperatures[label], "proxy": self.proxies.get(label)}
        return {name: value for name, value in found.items() if value is not None}

    def _tune(self, of: EvalSet, label: str, vectors: np.ndarray, indices: np.ndarray) -> None:
        """The temperature of the contrastive loss over images and their first captions, each caption once."""
        assert of.data.captions is not None
        first: dict[str, int] = {}
        for row, i in enumerate(indices):
            for caption in of.data.captions[i][:1]:
                first.setdefault(caption, row)
        rows = np.array(list(first.values()), np.int64)
        if len(rows) > PAIRS:
            chosen = np.sort(generator(self._request.seed, f"captions {of.data.digest}").permutation(len(rows))[:PAIRS])
            rows = rows[chosen]
        if len(rows) < 2:
            raise InputError(f"{of.name} has {len(rows)} different captions; two and more are needed to tune a scale")
        captions = [next(iter(of.data.captions[i])) for i in indices[rows]]
        view = self._embedder.views[label]
        texts = self._embedder.texts(view, captions)
        fitted = metrics.fit_logit_scale(view.encoders.logit_scale * vectors[rows] @ texts.T)
        self.proxies[label] = fitted.value
        if fitted.flag:
            self._results.note(f"{label}: the logit scale tuned on {of.name} is no ordinary optimum: {fitted.flag}")
        left = f", of {len(indices)} images" if len(rows) < len(indices) else ""
        self._results.note(f"logit scales were tuned on N = {len(rows)} images and captions of {of.name}{left}")


def _once(wanted: Iterable[Condition]) -> dict[tuple, Condition]:
    """Each condition once, with all that is wanted of it."""
    once: dict[tuple, Condition] = {}
    for condition in wanted:
        known = once.get(condition.key, condition)
        vectors, scores = known.vectors or condition.vectors, known.scores or condition.scores
        once[condition.key] = dataclasses.replace(known, vectors=vectors, scores=scores)
    return once


def _units(label: str, found: Embedded, condition: Condition) -> np.ndarray:
    """Unit embeddings. Raises NonFiniteError, also where those of patches are not finite."""
    if any(np.isnan(values).any() for values in found.local.values()):
        raise NonFiniteError(f"patch embeddings of {label!r} on {condition.name} are NaN, Inf or zero")
    return unit(found.vectors, f"image embeddings of {label!r} on {condition.name}")
