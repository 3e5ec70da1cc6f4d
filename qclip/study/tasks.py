"""Tasks: cells of one model on one evaluation that are measured together, and the order in which they may run.

An image is decoded and corrupted once for all variants of a task, so that a task has as many variants as may be
resident at once. The float model's own cells come first, in a task of their own where several processes work: the
others find its embeddings then.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterable, Mapping

from qclip.store import key_of

from .cells import Block, Grid
from .plan import Measured, Sets


@dataclasses.dataclass(frozen=True)
class Task:
    """blocks: variants of one model on one evaluation, each with the cells that are wanted of it. after: the key of the
    task that comes before it. keys: of the facts that it builds on: of the model, the sets, and the artifacts."""

    key: str
    model: str
    sets: Sets
    measured: Measured
    blocks: tuple[Block, ...]
    artifacts: tuple[str, ...]  # key of each block's quantized model, "" of float
    facts: Mapping[str, str]
    after: str | None = None

    @property
    def cells(self) -> list[str]:
        return [cell for block in self.blocks for cell in block.cells.values()]


def tasks(
    grid: Grid, done: Collection[str], resident: int, artifacts: Mapping[str, str], alone: bool = False
) -> list[Task]:
    """What is to be done: the cells that are not among `done`, `resident` variants at once beside float.

    artifacts: key of the quantized model of each variant, by `model` and `label` joined by a newline. alone: the float
    model's cells are a task of their own, after which the others come.
    """
    out: list[Task] = []
    for (model, sets), blocks in _by_evaluation(grid.blocks, done).items():
        facts = {f"model {model}": grid.facts.models[model]}
        facts |= {f"set {name}": grid.facts.sets[name] for name in sets.names()}
        floats = [block for block in blocks if block.variant.is_float]
        others = [block for block in blocks if not block.variant.is_float]
        if alone or not others:
            parts = [floats] if floats else []
            first = bool(parts)
        else:
            parts, first = [floats + others[: max(1, resident)]], False
            others = others[max(1, resident) :]
        parts += [others[at : at + resident] for at in range(0, len(others), max(1, resident))]
        before: str | None = None
        for part in parts:
            used = {
                f"set {b.variant.calibration}": grid.facts.sets[b.variant.calibration]
                for b in part
                if b.variant.calibration
            }
            keys = tuple(artifacts[f"{block.variant.model}\n{block.variant.label}"] for block in part)
            cells = [cell for block in part for cell in block.cells.values()]
            key = key_of("task", 1, cells=cells)[:32]
            out.append(Task(key, model, sets, grid.plan.measured, tuple(part), keys, facts | used, before))
            if first and before is None:
                before = key
    return out


def _by_evaluation(blocks: Iterable[Block], done: Collection[str]) -> dict[tuple[str, Sets], list[Block]]:
    """Blocks by model and evaluation, with the cells that are left; without those of which none is."""
    found: dict[tuple[str, Sets], list[Block]] = {}
    for block in blocks:
        left = {condition: cell for condition, cell in block.cells.items() if cell not in done}
        if left:
            found.setdefault((block.variant.model, block.sets), []).append(dataclasses.replace(block, cells=left))
    return found


class Queue:
    """Tasks in an order in which each comes after the one that it needs. One may be put back: somebody else has it."""

    def __init__(self, todo: Iterable[Task]) -> None:
        self._ready: deque[Task] = deque()
        self._waiting: dict[str, list[Task]] = {}
        self._running = 0
        todo = list(todo)
        known = {task.key for task in todo}
        for task in todo:
            if task.after in known and task.after is not None:
                self._waiting.setdefault(task.after, []).append(task)
            else:
                self._ready.append(task)

    def take(self) -> Task | None:
        """A task that can run now; None where there is none, or none yet."""
        if not self._ready:
            return None
        self._running += 1
        return self._ready.popleft()

    def finish(self, task: Task) -> None:
        """The task is done, or has failed: those that waited for it can run."""
        self._running -= 1
        self._ready.extend(self._waiting.pop(task.key, []))

    def put_back(self, task: Task, soon: bool = False) -> None:
        """The task did not run; soon: it is the next to be taken."""
        self._running -= 1
        (self._ready.appendleft if soon else self._ready.append)(task)

    @property
    def over(self) -> bool:
        return not (self._ready or self._waiting or self._running)
