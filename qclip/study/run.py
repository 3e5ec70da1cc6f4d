"""A plan, run: what is missing in the store is measured; what is there is left alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qclip.errors import InputError, option
from qclip.store import key_of

from .cells import Grid, expand, quantize_key
from .engines import Engine, Told, Work
from .engines.inprocess import run as in_process
from .engines.processes import Processes
from .facts import Facts, look, runtime_key, runtime_of
from .plan import Plan
from .store import StudyStore
from .tasks import Queue, Task, tasks

MOST_RESIDENT = 32
SHOWN = 12  # impossible variants in a message
OWN_BYTES = 64 << 20  # of a resident variant, beside its weights


@dataclasses.dataclass(frozen=True)
class Ready:
    """A plan that can be run: its grid, what of it is in the store, and the tasks that are left."""

    grid: Grid
    store: StudyStore
    work: Work
    cached: set[str]
    failed: dict[str, dict[str, Any]]  # in earlier runs, and not tried again
    todo: list[Task]
    runtime: dict[str, Any]
    notes: list[str]


def prepare(
    plan: Plan,
    store: StudyStore,
    threads: int | None = None,
    workers: int = 1,
    resident: int | None = None,
    skip_impossible: bool = False,
    retry_failed: bool = False,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
    apart: bool = False,
) -> Ready:
    """Look at models and sets, expand the plan, and see what is there.

    threads: of each worker; None: those of the machine, divided (apart: 1, they are not of this machine). resident:
    variants in memory at once; None: as many as fit into half of what is free. Raises InputError, also where variants
    are impossible and `skip_impossible` is not given.
    """
    threads = threads or (1 if apart else max(1, torch.get_num_threads() // workers))
    facts = look(plan, device, progress)
    grid = expand(plan, facts)
    if grid.impossible and not skip_impossible:
        shown = "; ".join(f"{each.name}: {each.why}" for each in grid.impossible[:SHOWN])
        more = f"; and {len(grid.impossible) - SHOWN} more" if len(grid.impossible) > SHOWN else ""
        raise InputError(
            f"{plan.path}: {len(grid.impossible)} variants are impossible ({shown}{more}); change the plan, or give "
            f"{option('skip-impossible', True)} to drop them"
        )
    if all(block.variant.is_float for block in grid.blocks):
        raise InputError(f"{plan.path}: no variant is left beside the float models")
    runtime = runtime_of(device, threads, plan.measured.batch)
    work = Work(store.url, runtime_key(runtime), threads, device)
    cells = grid.cells()
    cached = store.measured(work.runtime) & cells
    failed = {} if retry_failed else {c: why for c, why in store.failed(work.runtime).items() if c in cells - cached}
    left = cached | failed.keys()
    resident = resident or fitting(facts, workers)
    todo = tasks(grid, left, resident, artifacts(grid), apart or workers > 1, store.shared_locks)
    return Ready(grid, store, work, cached, failed, todo, runtime, [*changed(plan, store, facts), *strange(facts)])


def run(ready: Ready, engine: Engine, told: Told) -> None:
    """Measure what is left, by that engine. Raises OutputError where the store cannot be written."""
    store = ready.store
    with store.lock("store", shared=True):
        store.note_runtime(ready.work.runtime, ready.runtime)
        remember(ready.grid.plan, store, ready.grid.facts)
        if ready.todo:
            engine(Queue(ready.todo), ready.work, told)
            store.refresh()


def engine_of(workers: int, ray: str | None = None) -> Engine:
    """ray: the address of a cluster, or "auto"."""
    if ray is not None:
        from .engines.ray_cluster import RayCluster

        return RayCluster(ray)
    return in_process if workers == 1 else Processes(workers)


def artifacts(grid: Grid) -> dict[str, str]:
    """The key of the quantized model of every variant, "" of float."""
    found = {f"{b.variant.model}\n{b.variant.label}": b.variant for b in grid.blocks}
    return {name: quantize_key(each, grid.facts, grid.plan.measured.strict) for name, each in found.items()}


def fitting(facts: Facts, workers: int) -> int:
    """How many variants fit into half of the memory that is free, with the float model beside them."""
    free = _available() // 2 // workers
    each = max(facts.bytes.values()) + OWN_BYTES
    return max(1, min(MOST_RESIDENT, free // each - 1))


def _available() -> int:
    """Bytes of memory that programs could take without others being swapped out."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# What a plan's cells depend on is kept when it is run, so that tables need no models.


def remember(plan: Plan, store: StudyStore, facts: Facts) -> None:
    known = {"path": plan.path, "time": time.time(), "facts": facts.to_dict()}
    store.files.write(_remembered(plan), json.dumps(known, indent=1).encode())


def recall(plan: Plan, store: StudyStore) -> Grid:
    """The grid as it was when the plan was last run. Raises InputError where it never was."""
    try:
        _, found = _recalled(store, _remembered(plan))
    except FileNotFoundError:
        raise InputError(f"{plan.path} was never run with the store {store.where!r}; use `qclip study run`") from None
    return expand(plan, found)


def changed(plan: Plan, store: StudyStore, facts: Facts) -> list[str]:
    """What is not what it was in the last run of any plan that named it."""
    before: dict[str, str] = {}
    known = [_recalled(store, f"plans/{name}") for name in store.files.children("plans")]
    for _, each in sorted(known, key=lambda one: one[0]):
        for kind in KINDS:
            before |= {f"{kind} {name}": key for name, key in getattr(each, kind).items()}
    now = {f"{kind} {n}": k for kind in KINDS for n, k in getattr(facts, kind).items()}
    return [
        f"{name.partition(' ')[2]!r} is not what it was in an earlier run of this store: what depends on it is "
        "measured again"
        for name, key in now.items()
        if before.get(name, key) != key
    ]


def strange(facts: Facts) -> list[str]:
    """Artifacts that were made of other weights than those that they are compared with."""
    return [
        f"{folder!r} was made of {source!r} with other weights than the model under which the plan lists it, to which "
        "its differences are"
        for folder, source in facts.strange.items()
    ]


KINDS = ("models", "sets", "artifacts")


def _remembered(plan: Plan) -> str:
    return f"plans/{key_of('plan', 1, text=plan.text)[:32]}.json"


def _recalled(store: StudyStore, name: str) -> tuple[float, Facts]:
    """When a plan was run last, and what its cells depended on. Raises FileNotFoundError, or InputError."""
    content = store.json(name)
    try:
        return float(content.get("time", 0)), Facts.from_dict(content["facts"])
    except (TypeError, ValueError, KeyError) as why:
        raise InputError(
            f"{store.files.shown(name)} is not what was stored ({why}); remove it, and run the plan again"
        ) from None
