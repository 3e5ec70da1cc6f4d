"""How far a run is: counts that the terminal shows, and a small file in the store that other processes read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from qclip.errors import InputError
from qclip.files import write_atomic
from qclip.untrusted import parse_json

from .locks import locked
from .measure import Outcome
from .store import StudyStore
from .tasks import Task

OFTEN = 1.0  # seconds between two states of the file


@dataclasses.dataclass
class Counts:
    """Cells of a run, and what it did so far. `Told` of the engines."""

    total: int
    cached: int
    failed_before: int
    store: StudyStore
    plan: str
    done: int = 0
    failed: int = 0
    images: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    doing: dict[str, str] = dataclasses.field(default_factory=dict)  # by worker

    def __post_init__(self) -> None:
        self.started = time.time()
        self._seen: dict[str, int] = {}
        self._share: dict[str, float] = {}  # by worker: cells that what is embedded of its task amounts to
        self._cells: dict[str, int] = {}  # by worker: of its task
        self._written = 0.0
        self._file = store_file(self.store, platform.node(), os.getpid())

    @property
    def left(self) -> int:
        return self.total - self.cached - self.failed_before - self.done - self.failed

    @property
    def eta(self) -> float | None:
        """Seconds that are left, if the rest goes like what was done, where what is embedded of a task counts as part
        of its cells; None where nothing was."""
        begun = sum(self._share.values())
        finished = self.done + self.failed + begun
        return (time.time() - self.started) / finished * max(0.0, self.left - begun) if finished else None

    def began(self, task: Task, worker: str) -> None:
        self.doing[worker] = f"{task.model}: {', '.join(block.variant.label for block in task.blocks[:4])}" + (
            f" and {len(task.blocks) - 4} more" if len(task.blocks) > 4 else ""
        )
        self._cells[worker] = len(task.cells)
        self.changed()

    def progress(self, worker: str, what: str, done: int, total: int) -> None:
        before = self._seen.get(worker, 0)
        self._seen[worker] = done
        if ": " in what:  # "MODEL: SET", of `evaluate`
            self.images += max(0, done - before) if done >= before else done
            if total:
                self._share[worker] = self._cells.get(worker, 0) * min(1.0, done / total)
        self.doing[worker] = f"{what} {done}/{total}" if total else what
        self.changed()

    def ended(self, task: Task, worker: str, outcome: Outcome) -> None:
        self.done += len(outcome.done)
        self.failed += len(outcome.failed)
        for stage, seconds in outcome.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.doing.pop(worker, None)
        self._seen.pop(worker, None)
        self._share.pop(worker, None)
        self.changed(at_once=True)

    def changed(self, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._written >= OFTEN:
            self._written = time.monotonic()
            write_atomic(self._file, json.dumps(self.state()).encode(), sync=False)

    def state(self) -> dict[str, Any]:
        elapsed = time.time() - self.started
        return {
            "plan": self.plan,
            "host": platform.node(),
            "pid": os.getpid(),
            "started": self.started,
            "elapsed": elapsed,
            "cells": self.total,
            "cached": self.cached,
            "done": self.done,
            "failed": self.failed + self.failed_before,
            "left": self.left,
            "images": self.images,
            "images_per_second": self.images / elapsed if elapsed > 0 else 0.0,
            "eta": self.eta,
            "seconds": self.seconds,
            "doing": self.doing,
        }

    @contextlib.contextmanager
    def shown(self) -> Any:
        """While the block runs, other processes find the file, locked."""
        with locked(self._file.with_suffix(".lock")):
            try:
                self.changed(at_once=True)
                yield self
            finally:
                self._file.unlink(missing_ok=True)
                self._file.with_suffix(".lock").unlink(missing_ok=True)


def store_file(store: StudyStore, host: str, pid: int) -> Path:
    return store.folder / "runs" / f"{host}-{pid}.json"


def running(store: StudyStore) -> list[dict[str, Any]]:
    """The state of every run that uses the store now. What a killed run left behind is removed."""
    out = []
    for path in sorted((store.folder / "runs").glob("*.json")):
        with locked(path.with_suffix(".lock"), wait=False) as free:
            if free:  # nobody holds it: the run is over, or was killed
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
                continue
        with contextlib.suppress(OSError, InputError):  # it ended meanwhile
            found = parse_json(path.read_text(), str(path), InputError)
            if isinstance(found, dict):
                out.append(found)
    return out
