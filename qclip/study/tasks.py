"""Tasks: cells of one model on one evaluation that are measured together, and the order in which they may run.

An image is decoded and corrupted once for all variants of a task, so that a task has as many variants as may be
resident at once. Several workers share an evaluation by its conditions, so that no two of them corrupt the same image;
the clean images, which all of them need, they embed shard by shard, each another one (`qclip.store.Store.claimed`). A
task has one corruption then: none waits long for the last one. A group's mean is a task of its own, of few variants:
what it is made of is embedded for others, and what is not yet, when workers run out of those, it helps to embed.

Where workers see no claims of each other, who embeds comes first: of the tasks of a condition the one with the float
model's own cells, and before a group's mean the corruptions that it is made of.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping

from qclip.store import key_of

from .cells import Block, Grid, corruptions_of
from .plan import Measured, Sets
from .variants import FLOAT

MEANS = 4  # variants of a task of a group's mean, where several workers share an evaluation


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """whole: variants of one model on one evaluation, of which those conditions are wanted. facts: keys of what it
    builds on: of the model, and of the sets. after: the keys of the tasks that come before it."""

    key: str
    model: str
    sets: Sets
    measured: Measured
    whole: tuple[Block, ...]
    conditions: tuple[str, ...]
    artifacts: tuple[str, ...]  # key of each block's quantized model, "" of float
    facts: Mapping[str, str]
    after: frozenset[str] = frozenset()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Variants with the cells that are wanted. Made when it is asked for: large plans have very many."""
        return tuple(block.under(self.conditions) for block in self.whole)

    @property
    def cells(self) -> list[str]:
        return [cell for block in self.blocks for cell in block.cells.values()]


def tasks(
    grid: Grid,
    done: Collection[str],
    resident: int,
    artifacts: Mapping[str, str],
    apart: bool = False,
    claims: bool = False,
) -> list[Task]:
    """What is to be done: the cells that are not among `done`, `resident` variants at once beside float.

    artifacts: key of the quantized model of each variant, by `model` and `label` joined by a newline. apart: several
    workers share an evaluation, else a task has all of its conditions. claims: they see what others embed.
    """
    out: list[Task] = []
    for (model, sets), blocks in _by_evaluation(grid.blocks, done).items():
        facts = {f"model {model}": grid.facts.models[model]}
        facts |= {f"set {name}": grid.facts.sets[name] for name in sets.names()}
        known: dict[tuple[str, ...], dict[str, str]] = {}  # shared by tasks that calibrate on the same sets
        embedding: dict[str, list[str]] = {}  # by variant: the keys of tasks that embed it
        for conditions in _parts(blocks, apart):
            wanted = [block for block in blocks if not block.cells.keys().isdisjoint(conditions)]
            floats = [block for block in wanted if block.variant.is_float]
            others = [block for block in wanted if not block.variant.is_float]
            means = apart and any(len(corruptions_of(each)) > 1 for each in conditions)
            size = min(resident, MEANS) if means else resident
            first: str | None = None  # the key of the task with the float model's own cells
            for at in range(0, max(1, len(others)), size):
                part = [*(floats if at == 0 else ()), *others[at : at + size]]
                used = tuple(dict.fromkeys(b.variant.calibration for b in part if b.variant.calibration))
                if used not in known:
                    known[used] = facts | {f"set {name}": grid.facts.sets[name] for name in used}
                keys = tuple(artifacts[f"{block.variant.model}\n{block.variant.label}"] for block in part)
                cells = [block.cells[each] for block in part for each in conditions if each in block.cells]
                key = key_of("task", 1, cells=cells)[:32]
                after: set[str] = set()
                if not claims:
                    labels = {FLOAT, *(block.variant.label for block in part)} if means else ()
                    after.update({first} if first else (), *(embedding.get(label, ()) for label in labels))
                out.append(
                    Task(
                        key,
                        model,
                        sets,
                        grid.plan.measured,
                        tuple(part),
                        conditions,
                        keys,
                        known[used],
                        frozenset(after),
                    )
                )
                if not means:
                    first = first or (key if floats else None)
                    for block in part:
                        embedding.setdefault(block.variant.label, []).append(key)
    return out


def _parts(blocks: Iterable[Block], apart: bool) -> Iterator[tuple[str, ...]]:
    """The conditions of an evaluation as tasks have them: the sets as they are, each corruption, and the means of
    groups, which are made of these."""
    wanted = list(dict.fromkeys(condition for block in blocks for condition in block.cells))
    if not apart:
        yield tuple(wanted)
        return
    kinds: tuple[list[str], list[str], list[str]] = ([], [], [])
    for each in wanted:
        kinds[min(len(corruptions_of(each)), 2)].append(each)
    clean, single, groups = kinds
    yield from filter(None, [tuple(clean), *((each,) for each in single), tuple(groups)])


def _by_evaluation(blocks: Iterable[Block], done: Collection[str]) -> dict[tuple[str, Sets], list[Block]]:
    """Blocks by model and evaluation, with the cells that are left; without those of which none is."""
    found: dict[tuple[str, Sets], list[Block]] = {}
    for block in blocks:
        left = {condition: cell for condition, cell in block.cells.items() if cell not in done}
        if left:
            found.setdefault((block.variant.model, block.sets), []).append(dataclasses.replace(block, cells=left))
    return found


class Queue:
    """Tasks in an order in which each comes after those that it needs. One may be put back: somebody else has it."""

    def __init__(self, todo: Iterable[Task]) -> None:
        todo = list(todo)
        known = {task.key for task in todo}
        self._needs = {task.key: set(needs) for task in todo if (needs := task.after & known)}
        self._ready = deque(task for task in todo if task.key not in self._needs)
        self._waiting: dict[str, list[Task]] = {}  # by what they wait for
        for task in todo:
            for key in self._needs.get(task.key, ()):
                self._waiting.setdefault(key, []).append(task)
        self._running = 0

    def take(self) -> Task | None:
        """A task that can run now; None where there is none, or none yet."""
        if not self._ready:
            return None
        self._running += 1
        return self._ready.popleft()

    def finish(self, task: Task) -> None:
        """The task is done, or has failed: those that waited for it can run."""
        self._running -= 1
        for other in self._waiting.pop(task.key, []):
            self._needs[other.key].discard(task.key)
            if not self._needs[other.key]:
                self._ready.append(other)

    def put_back(self, task: Task, soon: bool = False) -> None:
        """The task did not run; soon: it is the next to be taken."""
        self._running -= 1
        (self._ready.appendleft if soon else self._ready.append)(task)

    @property
    def over(self) -> bool:
        return not (self._ready or self._waiting or self._running)
