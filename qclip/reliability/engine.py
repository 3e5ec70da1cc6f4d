"""`evaluate`: models and data sets in, one table out. Embeds once, scores many; differences are paired."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from qclip import data as qdata
from qclip import metrics
from qclip.errors import InputError
from qclip.models import class_names
from qclip.results import Results
from qclip.store import Store

from .classification import Outputs, read_out
from .embed import Embedded, Embedder, Progress, Stage, View
from .tables import DetectionTable, Setting, Table, about_model, environment

NOISE = "gaussian_noise"
SEVERITIES = (1, 2, 3, 4, 5)
NOISE_SAMPLE = 1000
REPLICATES = 1000


def evaluate(
    models: Mapping[str, nn.Module] | nn.Module,
    data: Any,
    ood: Any = (),
    shift: Any = (),
    dev: Any = None,
    templates: str | Sequence[str] | None = None,
    full: bool = False,
    seed: int = 0,
    *,
    batch: int = 64,
    strict: bool = False,
    cache: bool | str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Results:
    """How reliable the models are, and what differs from the first of them.

    models: label -> model with an adapter (open_clip, timm, Hugging Face; float or quantized), or one model. The first
        is the reference of every paired difference.
    data: ID sets, one or a list of names (`KIND:PATH...`) or `ImageSet`s, labelled, with class names.
    ood: OOD sets; their labels are not read. A mapping {"near": ..., "far": ...} or a name that starts with `near=` /
        `far=` says of which kind; else a name that contains the word does.
    shift: labelled sets of other origin whose classes are among those of the first ID set. A `group` column in any
        labelled set gives the worst group's accuracy and the group gap, a bool column a subset of its true rows.
    dev: labelled set on which each model's temperature is fitted; without one `ece_ts` is None.
    templates: prompts with a `{}`, or the name of a list in `qclip.models.class_names.TEMPLATES`; default: what the set
        brings along, else "simple".
    full: corruptions on every image instead of a fixed seeded sample of 1,000.
    strict: an unreadable image stops the run; else it is left out, counted and named in `notes`.
    cache: where embeddings are kept: None = the user's cache folder, a path, or False.
    device: the models are moved there; default: where they are.
    progress: called as (what, images done, images in all) while images are embedded.

    Intervals are 95 %, from 1,000 paired bootstrap replicates (BCa for ECE); ID and OOD sets are drawn separately.
    Raises InputError / DataError on unusable input, NonFiniteError where a model gives NaN or Inf.
    """
    models = {"model": models} if isinstance(models, nn.Module) else dict(models)
    if not models:
        raise InputError("no model to evaluate; pass a model or a dict {label: model}")
    id_sets, shift_sets = [_load(d, progress) for d in _listed(data)], [_load(d, progress) for d in _listed(shift)]
    if not id_sets:
        raise InputError("no data to evaluate on; pass the name of at least one labelled set")
    ood_sets = [(kind, _load(d, progress)) for kind, d in _kinds(ood)]
    dev_set = None if dev is None else _load(dev, progress)
    _name_apart([*id_sets, *shift_sets, *(found for _, found in ood_sets)])
    results = Results(meta=environment(seed, batch, REPLICATES))
    run = _Run(
        results,
        Embedder(models, Store.of(cache, "embeddings"), batch, strict, seed, device, progress),
        seed,
        full,
        templates,
    )
    run.all(id_sets, ood_sets, shift_sets, dev_set)
    return results


@dataclasses.dataclass
class _Run:
    """One evaluation. Each method writes the rows of one kind of set."""

    results: Results
    embedder: Embedder
    seed: int
    full: bool
    templates: str | Sequence[str] | None
    temperatures: dict[str, float | None] = dataclasses.field(default_factory=dict)

    def all(
        self,
        id_sets: list[qdata.ImageSet],
        ood_sets: list[tuple[str, qdata.ImageSet]],
        shift_sets: list[qdata.ImageSet],
        dev_set: qdata.ImageSet | None,
    ) -> None:
        first, others = id_sets[0], [*shift_sets, *([dev_set] if dev_set else [])]
        for labelled in (*id_sets, *others):
            labelled.labelled()
            for note in (*labelled.notes, *labelled.label_notes):
                self.results.note(note)
        for _, ood in ood_sets:
            for note in ood.notes:
                self.results.note(note)
        relabelled = {id(s): s.labels_in(first) for s in others}
        noise = [(s, self._sample(s)) for s in id_sets]
        stages = [Stage(s) for s in (*id_sets, *shift_sets, *(s for _, s in ood_sets), *([dev_set] if dev_set else []))]
        stages += [Stage(s.select(rows), NOISE, severity) for s, rows in noise for severity in SEVERITIES]
        self.embedder.expect(stages)
        views = self.embedder.views.values()
        for view in views:
            about_model(self.results, view.label, view.model)
        classifiers = self._classifiers(first)
        self._fit(dev_set, classifiers, None if dev_set is None else relabelled[id(dev_set)], [*id_sets, *shift_sets])
        id_outputs: dict[str, Outputs] = {}
        for k, (labelled, rows) in enumerate(noise):
            own = classifiers if k == 0 else self._classifiers(labelled)
            assert labelled.labels is not None
            clean = self._labelled(labelled, "id", labelled.labels, own)
            self._noise(labelled, rows, own, clean)
            id_outputs = id_outputs or {label: outputs for label, (_, outputs) in clean.items()}
        for labelled in shift_sets:
            self._labelled(labelled, "shift", relabelled[id(labelled)], classifiers)
        self._ood(first, id_outputs, ood_sets, classifiers)

    def _sample(self, data: qdata.ImageSet) -> np.ndarray:
        """Positions of the images that are corrupted."""
        if self.full or len(data) <= NOISE_SAMPLE:
            return np.arange(len(data))
        return np.sort(np.random.default_rng(self.seed).permutation(len(data))[:NOISE_SAMPLE])

    def _classifiers(self, data: qdata.ImageSet) -> dict[str, np.ndarray]:
        templates = prompt_templates(self.templates if self.templates is not None else data.prompts)
        self.results.meta.setdefault("templates", {})[data.name] = templates
        assert data.classes is not None
        return {
            label: self.embedder.classifier(view, data.classes, templates)
            for label, view in self.embedder.views.items()
        }

    def _embed(self, stage: Stage) -> dict[str, Embedded]:
        found = self.embedder.images(stage)
        bad = next(iter(found.values())).unreadable
        if bad and not stage.corruption:
            shown = "; ".join(why for _, why in bad[:5]) + (" ..." if len(bad) > 5 else "")
            self.results.note(
                f"{stage.data.name}: {len(bad)} of {len(stage.data)} images cannot be read and are left out: {shown}"
            )
        return found

    def _read(
        self, embedded: dict[str, Embedded], classifiers: dict[str, np.ndarray], labels: np.ndarray | None
    ) -> dict[str, Outputs]:
        return {
            label: read_out(
                e.vectors,
                classifiers[label],
                self.embedder.views[label].encoders.logit_scale,
                None if labels is None else labels[e.indices],
                self.temperatures.get(label),
            )
            for label, e in embedded.items()
        }

    def _fit(
        self,
        dev: qdata.ImageSet | None,
        classifiers: dict[str, np.ndarray],
        labels: np.ndarray | None,
        evaluated: list[qdata.ImageSet],
    ) -> None:
        if dev is None or labels is None:
            self.temperatures = dict.fromkeys(self.embedder.views)
            self.results.note("temperature and ece_ts are undefined: no dev set was given to fit the temperature on")
            return
        for label, embedded in self._embed(Stage(dev)).items():
            logits = self.embedder.views[label].encoders.logit_scale * (embedded.vectors @ classifiers[label].T)
            fitted = metrics.fit_temperature(logits, labels[embedded.indices])
            self.temperatures[label] = fitted.value
            if fitted.flag:
                self.results.note(f"{label}: the temperature from {dev.name} is no ordinary optimum: {fitted.flag}")
        self.results.note(f"temperatures were fitted on {dev.name} ({len(dev)} images), one for each model")
        if any(dev.digest == data.digest for data in evaluated):
            self.results.note(f"{dev.name} is evaluated too: its ece_ts is of the images that fitted the temperature")

    def _labelled(
        self, data: qdata.ImageSet, role: str, labels: np.ndarray, classifiers: dict[str, np.ndarray]
    ) -> dict[str, tuple[Embedded, Outputs]]:
        """Rows of a clean labelled set."""
        embedded = self._embed(Stage(data))
        outputs = self._read(embedded, classifiers, labels)
        kept = next(iter(embedded.values())).indices
        setting = Setting(data.name, role, data.digest, len(kept), len(next(iter(classifiers.values()))), self.seed)
        table = Table(self.results, setting, list(self.embedder.views), REPLICATES)
        groups = {name: values[kept] for name, values in data.groups.items()}
        table.metrics(outputs, groups)
        table.temperatures(self.temperatures)
        table.agreement({label: e.vectors for label, e in embedded.items()}, outputs)
        table.bins(outputs)
        if role == "id":
            table.speed({label: e.seconds for label, e in embedded.items()})
        return {label: (embedded[label], outputs[label]) for label in outputs}

    def _noise(
        self,
        data: qdata.ImageSet,
        rows: np.ndarray,
        classifiers: dict[str, np.ndarray],
        clean: dict[str, tuple[Embedded, Outputs]],
    ) -> None:
        """Rows of a corrupted sample at each severity; severity 0 is the same images without corruption."""
        sample = data.select(rows)
        kept = next(iter(clean.values()))[0].indices
        severities = {
            0: {label: outputs.take(np.flatnonzero(np.isin(kept, rows))) for label, (_, outputs) in clean.items()}
        }
        assert data.labels is not None
        for severity in SEVERITIES:
            embedded = self._embed(Stage(sample, NOISE, severity))
            severities[severity] = self._read(embedded, classifiers, data.labels[rows])
        if len(rows) < len(data):
            self.results.note(
                f"{data.name}: {NOISE} is on a fixed sample of {len(rows)} of {len(data)} images (seed {self.seed})"
            )
        n, classes = len(next(iter(severities[0].values()))), len(next(iter(classifiers.values())))
        setting = Setting(data.name, "corrupted", sample.digest, n, classes, self.seed, NOISE)
        Table(self.results, setting, list(self.embedder.views), REPLICATES).severities(severities)

    def _ood(
        self,
        id_set: qdata.ImageSet,
        id_outputs: dict[str, Outputs],
        ood_sets: list[tuple[str, qdata.ImageSet]],
        classifiers: dict[str, np.ndarray],
    ) -> None:
        if not ood_sets:
            return
        self.results.note(f"OOD detection: ID is {id_set.name}")
        n_id = len(next(iter(id_outputs.values())))
        table = DetectionTable(
            self.results,
            id_set.digest,
            n_id,
            list(self.embedder.views),
            REPLICATES,
            self.seed,
            {label: outputs.ood for label, outputs in id_outputs.items()},
        )
        for kind, data in ood_sets:
            outputs = self._read(self._embed(Stage(data)), classifiers, None)
            table.add(data.name, data.digest, kind, {label: o.ood for label, o in outputs.items()})
        table.means()


def _listed(data: Any) -> list[Any]:
    return [data] if isinstance(data, (str, os.PathLike, qdata.ImageSet)) else list(data or ())


def _kinds(ood: Any) -> list[tuple[str, Any]]:
    """(kind, set) pairs; kind is "near", "far" or ""."""
    if isinstance(ood, Mapping):
        for kind in ood:
            if kind not in ("near", "far", ""):
                raise InputError(f"an OOD set is 'near' or 'far', not {kind!r}; use these keys")
        return [(kind, data) for kind, listed in ood.items() for data in _listed(listed)]
    out = []
    for data in _listed(ood):
        kind = ""
        if isinstance(data, str) and data.startswith(("near=", "far=")):
            kind, data = data.split("=", 1)
        name = data.name if isinstance(data, qdata.ImageSet) else os.path.basename(str(data).split("?")[0])
        out.append((kind or next((k for k in ("near", "far") if k in name.lower()), ""), data))
    return out


def _load(data: Any, progress: Progress | None) -> qdata.ImageSet:
    if isinstance(data, qdata.ImageSet):
        return dataclasses.replace(data)
    return qdata.load(os.fspath(data), progress=progress)


def _name_apart(sets: list[qdata.ImageSet]) -> None:
    """Rows are found by the name of their set: a second set of a name gets a number."""
    taken: set[str] = set()
    for found in sets:
        name, count = found.name, 1
        while found.name in taken:
            count += 1
            found.name = f"{name} ({count})"
        taken.add(found.name)


def prompt_templates(templates: str | Sequence[str] | None) -> list[str]:
    """A list of prompts with a `{}` from a list, the name of one of ours, or one prompt. Raises InputError."""
    known = class_names.TEMPLATES
    if templates is None:
        templates = known["simple"]
    elif isinstance(templates, str):
        if "{}" not in templates and templates not in known:
            raise InputError(
                f"unknown templates {templates!r}; known: {', '.join(known)}, or give prompts with a '{{}}'"
            )
        templates = known.get(templates, [templates])
    templates = list(templates)
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise InputError(f"template {template!r} needs one '{{}}' where the class name goes")
    if not templates:
        raise InputError("the list of templates is empty; give at least one prompt with a '{}'")
    return templates


__all__ = ["View", "evaluate", "prompt_templates"]
