"""A task's cells, measured: load, calibrate and quantize, embed, score, compare, keep. The functions are those of
`qclip quantize` and `qclip evaluate`; here is only what is kept of them, and what happens when one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits
from torch import nn

from qclip.data import ImageSet
from qclip.errors import InputError, NonFiniteError, OutputError
from qclip.machine import cpu_name
from qclip.progress import Progress
from qclip.reliability import evaluate
from qclip.results import Results
from qclip.spectral import weight_spectrum

from .cells import CLEAN, Block, corruptions_of, measurements
from .parts import images_by_cell, part_of
from .resident import Resident
from .rows import table
from .store import StudyStore
from .tasks import Task
from .variants import FLOAT

STOPS = (OutputError, BrokenPipeError)  # the store is full or gone, or who wants to be told is: no failure of a cell


@dataclasses.dataclass
class Outcome:
    """What came of a task. busy: another run has it, and it is to be asked for again. seconds: by stage."""

    done: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    busy: bool = False
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
        self.store, self.runtime, self.threads, self.progress = store, runtime, threads, progress
        self._resident = Resident(store, runtime, device, progress)

    def run(self, task: Task) -> Outcome:
        """Measure the cells of a task that nobody has measured since it was made. Raises OutputError where the store
        cannot be written, BrokenPipeError where `progress` does; whatever else goes wrong is kept as the failure of a
        cell."""
        with self.store.lock(task.key, wait=False) as mine, threadpool_limits(self.threads, "blas"):
            if not mine:
                return Outcome(busy=True)
            self.store.refresh()
            there = self.store.measured(self.runtime)
            left = [block.under({c for c, cell in block.cells.items() if cell not in there}) for block in task.blocks]
            out = Outcome(done=[cell for cell in task.cells if cell in there])
            if group := self._group(task, left, out):
                self._measure(task, left, group, out)
            return out

    def _group(self, task: Task, left: list[Block], out: Outcome) -> dict[str, nn.Module]:
        """Models by label, float first; a variant that cannot be made fails all its cells. Empty where none is left."""
        wanted = [(block, key) for block, key in zip(left, task.artifacts, strict=True) if block.cells]
        if not wanted:
            return {}
        try:
            with _timed(out, "load"):
                group = {FLOAT: self._resident.model(task)}
        except STOPS:
            raise
        except Exception as error:
            for block, _ in wanted:
                self._fail(block, list(block.cells), error, out)
            return {}
        self._resident.release(task.model, [key for _, key in wanted])
        left_to_make = [(block, key) for block, key in wanted if not block.variant.is_float]
        for wait in (False, True):  # what another worker is making comes last: meanwhile it is made
            for block, key in tuple(left_to_make):
                try:
                    with _timed(out, "quantize"):
                        found = self._resident.variant(task, block.variant, key, wait)
                except STOPS:
                    raise
                except Exception as error:
                    self._fail(block, list(block.cells), error, out)
                    left_to_make.remove((block, key))
                    continue
                if found is not None:
                    group[block.variant.label] = found
                    left_to_make.remove((block, key))
        return group

    def _measure(self, task: Task, left: list[Block], group: dict[str, nn.Module], out: Outcome) -> None:
        """All conditions of all variants at once; where that fails, of each variant, then each condition."""
        over = {*out.done, *out.failed}  # of what failed together some may be kept
        here = [block.under({c for c, cell in block.cells.items() if cell not in over}) for block in left]
        here = [block for block in here if block.cells and block.variant.label in group]
        if not here:
            return
        wanted = list(dict.fromkeys(condition for block in here for condition in block.cells))
        try:
            self._together(task, here, wanted, group, out)
        except STOPS:
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
            samples = images_by_cell(pq.read_table(file))
        cells = sum(len(block.cells) for block in blocks)
        each = (time.perf_counter() - began) / cells
        with _timed(out, "keep"):
            for block in blocks:
                for condition, cell in block.cells.items():
                    label = block.variant.label
                    part = part_of(results, label, condition, list(group))
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
            return None if name is None else self._resident.set(task, name)

        def many(names: tuple[str, ...]) -> list[ImageSet]:
            return [self._resident.set(task, name) for name in names]

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


def _halves(blocks: list[Block], wanted: list[str]) -> Iterator[list[Block]]:
    """Smaller parts of what failed: each variant, or each condition of the only one."""
    if len(blocks) > 1:
        yield from ([block] for block in blocks)
    elif len(wanted) > 1:
        yield from ([blocks[0].under({condition})] for condition in wanted)


@contextlib.contextmanager
def _timed(out: Outcome, stage: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        out.seconds[stage] = out.seconds.get(stage, 0.0) + time.perf_counter() - began
