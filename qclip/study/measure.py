"""A task's cells, measured: load, calibrate and quantize, embed, score, compare, keep. The functions are those of
`qclip quantize` and `qclip evaluate`; here is only what is kept of them, and what happens when one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits
from torch import nn

from qclip import artifact, ptq, zoo
from qclip import data as qdata
from qclip.data import ImageSet
from qclip.errors import InputError, ModelError, NonFiniteError, OutputError
from qclip.machine import cpu_name
from qclip.progress import Progress
from qclip.reliability import evaluate
from qclip.results import Results
from qclip.spectral import weight_spectrum

from .cells import CLEAN, Block, corruptions_of, measurements
from .facts import model_key, set_key
from .rows import table
from .store import StudyStore
from .tasks import Task
from .variants import FLOAT


@dataclasses.dataclass
class Outcome:
    """What came of a task. busy: another run has it, and it is to be asked for again. seconds: by stage."""

    done: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    busy: bool = False
    images: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)


def with_spectra(
    group: dict[str, nn.Module], spectra: bool, progress: Progress | None = None, **settings: Any
) -> Results:
    """`evaluate` of models, and where it is asked for the spectra of their weights."""
    results = evaluate(group, progress=progress, **settings)
    if spectra:
        (label, first), *others = group.items()
        try:
            results = Results.merge(results, weight_spectrum(first, dict(others), label=label, progress=progress))
        except InputError as error:  # the models differ in shape: everything else can be compared
            results.note(f"weight spectra were not compared: {error}")
    return results


class Bench:
    """Runs tasks one after the other, and keeps models and sets between them.

    runtime: key of what decides the last bits, under which the store keeps what is measured here.
    """

    def __init__(
        self, store: StudyStore, runtime: str, threads: int, device: str = "cpu", progress: Progress | None = None
    ) -> None:
        self.store, self.runtime, self.threads, self.device, self.progress = store, runtime, threads, device, progress
        self._sets: dict[str, ImageSet] = {}
        self._models: dict[str, nn.Module] = {}  # float, the last one alone
        self._resident: dict[str, nn.Module] = {}  # variants of the last task by label

    def run(self, task: Task) -> Outcome:
        """Measure the cells of a task that nobody has measured since it was made. Raises OutputError where the store
        cannot be written; whatever else goes wrong is kept as the failure of a cell."""
        with self.store.lock(task.key, wait=False) as mine, threadpool_limits(self.threads, "blas"):
            if not mine:
                return Outcome(busy=True)
            self.store.refresh()
            there = self.store.measured(self.runtime)
            left = [block.under({c for c, cell in block.cells.items() if cell not in there}) for block in task.blocks]
            out = Outcome(done=[cell for cell in task.cells if cell in there])
            with _timed(out, "load"):
                group = self._group(task, left, out)
            out.seconds["load"] -= out.seconds.get("quantize", 0.0)
            if group:
                self._measure(task, left, group, out)
            return out

    def _group(self, task: Task, left: list[Block], out: Outcome) -> dict[str, nn.Module]:
        """Models by label, float first; a variant that cannot be made fails all its cells. Empty where none is left."""
        wanted = [(block, key) for block, key in zip(left, task.artifacts, strict=True) if block.cells]
        if not wanted:
            return {}
        try:
            group = {FLOAT: self._model(task)}
        except Exception as error:
            for block, _ in wanted:
                self._fail(block, list(block.cells), error, out)
            return {}
        names = {f"{task.model}\n{key}" for _, key in wanted}
        self._resident = {name: model for name, model in self._resident.items() if name in names}
        left_to_make = [(block, key) for block, key in wanted if not block.variant.is_float]
        for wait in (False, True):  # what another worker is making comes last: meanwhile it is made
            for block, key in tuple(left_to_make):
                try:
                    with _timed(out, "quantize"):
                        found = self._variant(task, block, key, group[FLOAT], wait)
                except OutputError:
                    raise
                except Exception as error:
                    self._fail(block, list(block.cells), error, out)
                    left_to_make.remove((block, key))
                    continue
                if found is not None:
                    group[block.variant.label] = found
                    left_to_make.remove((block, key))
        return group

    def _model(self, task: Task) -> nn.Module:
        if task.model not in self._models:
            self._models.clear()
            self._resident.clear()
            self._say(f"loading {task.model}")
            model = zoo.load_model(task.model, self.device)
            if model_key(model) != task.facts[f"model {task.model}"]:
                raise ModelError(f"{task.model!r} has changed since the plan was expanded; run it again")
            self._models[task.model] = model
        return self._models[task.model]

    def _variant(self, task: Task, block: Block, key: str, model: nn.Module, wait: bool) -> nn.Module | None:
        """The quantized model, which stays resident; None where another worker makes it and this one is not to wait."""
        name = f"{task.model}\n{key}"
        if name not in self._resident and (found := self._made(task, block, key, model, wait)) is not None:
            self._resident[name] = found
        return self._resident.get(name)

    def _made(self, task: Task, block: Block, key: str, model: nn.Module, wait: bool) -> nn.Module | None:
        variant = block.variant
        if variant.artifact is not None:
            if artifact.description_hash(artifact.read_description(variant.artifact)) != key:
                raise ModelError(f"{variant.artifact!r} has changed since the plan was expanded; run it again")
            return artifact.load(variant.artifact, self.device)

        def make(folder: Path) -> None:
            assert variant.recipe is not None
            self._say(f"quantizing {task.model} with {variant.label}")
            data = None if variant.calibration is None else self._set(task, variant.calibration)
            small = ptq.quantize(
                model,
                variant.recipe,
                data,
                variant.seed,
                strict=task.measured.strict,
                progress=self.progress,
                resume=self.store.folder / "methods",
            )
            artifact.save(small, folder)

        folder = self.store.quantized(f"{key}-{self.runtime}", make, wait)
        return (
            None if folder is None else artifact.load(folder, self.device)
        )  # never the one just made: whoever comes later has only this

    def _set(self, task: Task, name: str) -> ImageSet:
        if name not in self._sets:
            data = qdata.load(name)
            if set_key(data) != task.facts[f"set {name}"]:
                raise InputError(f"{name!r} has changed since the plan was expanded; run it again")
            self._sets[name] = data
        return self._sets[name]

    def _measure(self, task: Task, left: list[Block], group: dict[str, nn.Module], out: Outcome) -> None:
        """All conditions of all variants at once; where that fails, of each variant, then each condition."""
        here = [block for block in left if block.cells and block.variant.label in group]
        if not here:
            return
        wanted = list(dict.fromkeys(condition for block in here for condition in block.cells))
        try:
            self._together(task, here, wanted, group, out)
        except OutputError:
            raise
        except Exception as error:
            for part in _halves(here, wanted):
                one = {FLOAT: group[FLOAT]} | {block.variant.label: group[block.variant.label] for block in part}
                self._measure(task, part, one, out)
            if len(here) == 1 and len(wanted) == 1:
                self._fail(here[0], wanted, error, out)

    def _together(
        self, task: Task, blocks: list[Block], wanted: list[str], group: dict[str, nn.Module], out: Outcome
    ) -> None:
        began = time.perf_counter()
        with _timed(out, "evaluate"), tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "samples.parquet"
            settings = self._settings(task, wanted) | {"samples": file}
            spectra = task.measured.spectra and CLEAN in wanted
            results = with_spectra(group, spectra, self.progress, **settings)
            samples = _by_cell(pq.read_table(file))
        cells = sum(len(block.cells) for block in blocks)
        each = (time.perf_counter() - began) / cells
        with _timed(out, "keep"):
            for block in blocks:
                for condition, cell in block.cells.items():
                    label = block.variant.label
                    part = _part(results, label, condition, list(group))
                    if not part.rows:  # its embeddings are not finite, and a note says where
                        whys = [note for note in part.notes if note.startswith(f"{label}: ")]
                        self._fail(block, [condition], NonFiniteError(whys[0] if whys else "nothing was measured"), out)
                        continue
                    rows = table(part, label, block, cell, self.runtime, self.threads, each)
                    details = Results(notes=part.notes, meta=part.meta, curves=part.curves).text()
                    self.store.write(self.runtime, cell, rows, details, samples.get((label, condition)))
                    out.done.append(cell)

    def _settings(self, task: Task, wanted: list[str]) -> dict[str, Any]:
        """The arguments of `evaluate` for these conditions."""
        sets, measured = task.sets, task.measured

        def one(name: str | None) -> ImageSet | None:
            return None if name is None else self._set(task, name)

        def many(names: tuple[str, ...]) -> list[ImageSet]:
            return [self._set(task, name) for name in names]

        found: dict[str, Any] = {"data": one(sets.data), "dev": one(sets.dev), "proxy": one(sets.proxy)}
        noise = tuple(dict.fromkeys(name for condition in wanted for name in corruptions_of(condition)))
        names: list[str] | None = ["corrupted"]
        if CLEAN in wanted:
            found |= {
                "ood": {kind: many(listed) for kind, listed in sets.ood},
                "shift": many(sets.shift),
                "captions": many(sets.captions),
                "images": many(sets.images),
                "train": one(sets.train),
                "negatives": measured.negatives,
                "scores": measured.scores,
            }
            named = measurements(measured) + (["corrupted"] if noise else [])
            names = None if measured.measurements is None else named
        return found | {
            "measurements": names,
            "corruptions": noise,
            "severities": measured.severities,
            "full": measured.full,
            "jpeg85": measured.jpeg85,
            "templates": measured.templates,
            "replicates": measured.replicates,
            "seed": measured.seed,
            "batch": measured.batch,
            "strict": measured.strict,
            "cache": self.store.embeddings,
        }

    def _fail(self, block: Block, conditions: list[str], error: Exception, out: Outcome) -> None:
        for condition in conditions:
            cell = block.cells[condition]
            facts = {
                "model": block.variant.model,
                "variant": block.variant.label,
                "evaluation": block.sets.data,
                "condition": condition,
                "error": f"{type(error).__name__}: {error}",
                "traceback": "".join(traceback.format_exception(error)),
                "host": cpu_name(),
            }
            self.store.fail(self.runtime, cell, facts)
            out.failed.append(cell)

    def _say(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, 0, 0)


def _halves(blocks: list[Block], wanted: list[str]) -> Iterator[list[Block]]:
    """Smaller parts of what failed: each variant, or each condition of the only one."""
    if len(blocks) > 1:
        yield from ([block] for block in blocks)
    elif len(wanted) > 1:
        yield from ([blocks[0].under({condition})] for condition in wanted)


def _part(results: Results, label: str, condition: str, labels: list[str]) -> Results:
    """What was measured of one model under one condition; what belongs to no model is float's, but for what counts the
    models that happened to be measured together."""
    owners = (label, "") if label == FLOAT else (label,)
    rows = results.where(model=owners, corruption=condition)
    others = [re.compile(rf"(?<![\w-]){re.escape(each)}(?![\w-])") for each in labels if each not in (label, FLOAT)]
    notes = [note for note in results.notes if not any(other.search(note) for other in others)]
    meta = dict(results.meta)
    meta["models"] = {label: meta.get("models", {}).get(label, {})}
    kept = [row for row in rows.rows if row["model"] or not row["metric"].startswith("wins")]
    return Results(kept, notes, meta, rows.curves)


def _by_cell(samples: pa.Table) -> dict[tuple[str, str], pa.Table]:
    """The outputs of images by model and condition, in their order. A group's mean has no images of its own."""
    keys = [pc.cast(samples[name], pa.string()).combine_chunks() for name in ("model", "corruption")]
    joined = pc.binary_join_element_wise(*keys, "\n").dictionary_encode()
    codes = joined.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(joined.dictionary) + 1))
    parts = {}
    for code, name in enumerate(joined.dictionary.to_pylist()):
        model, _, condition = name.rpartition("\n")
        parts[model, condition] = samples.take(pa.array(order[starts[code] : starts[code + 1]]))
    return parts


@contextlib.contextmanager
def _timed(out: Outcome, stage: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        out.seconds[stage] = out.seconds.get(stage, 0.0) + time.perf_counter() - began
