"""What runs the tasks of a study: this process, processes on this machine, or a Ray cluster. Which of them does changes
no number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

from ..measure import Outcome
from ..store import StudyStore
from ..tasks import Queue, Task


@dataclasses.dataclass(frozen=True)
class Work:
    """What a worker needs to know: the store's folder or URL, the runtime under which it measures, threads, device."""

    store: str
    runtime: str
    threads: int
    device: str = "cpu"


class Told(Protocol):
    """Who is told how far the work is."""

    def began(self, task: Task, worker: str) -> None: ...

    def progress(self, worker: str, what: str, done: int, total: int) -> None: ...

    def ended(self, task: Task, worker: str, outcome: Outcome) -> None: ...


Engine = Callable[[Queue, Work, Told], None]
WAIT = 0.2  # seconds until a task that another run has is asked for again


def given_up(task: Task, work: Work, error: str) -> Outcome:
    """A task that costs every worker its life fails in what it has not measured."""
    store = StudyStore.open(work.store)
    there = store.measured(work.runtime)
    outcome = Outcome(done=[cell for cell in task.cells if cell in there])
    for block in task.blocks:
        for condition, cell in block.cells.items():
            if cell not in there:
                told = {"model": task.model, "variant": block.variant.label, "evaluation": task.sets.data}
                store.fail(work.runtime, cell, told | {"condition": condition, "error": error, "traceback": ""})
                outcome.failed.append(cell)
    return outcome
