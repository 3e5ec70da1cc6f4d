"""`qclip study plan`, `run` and `status`: what a plan would take, its cells measured, how far it is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qclip.errors import InputError, printable

from .. import common
from .arguments import Plan, Resident, Skip, Where, Workers, recalled, store_of
from .live import live


def plan_command(
    plan: Plan,
    store: Where = None,
    workers: Workers = 1,
    resident: Resident = None,
    skip_impossible: Skip = False,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Time a few images, to estimate the rest.")] = True,
    device: common.Device = "cpu",
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Show what a plan is made of, what of it is in the store, and what the rest would take; measure nothing."""
    from qclip.study.estimate import estimate
    from qclip.study.plan_file import read
    from qclip.study.run import prepare
    from qclip.study.store import StudyStore

    found = read(plan)
    where = store_of(plan, store)
    known = StudyStore.look(where)
    ready = prepare(found, known, threads, workers, resident, skip_impossible, False, device, common.say)
    for note in ready.notes:
        common.say(f"warning: {note}")
    for each in ready.grid.impossible:
        common.say(f"impossible: {each.name}: {each.why}")
    expected = estimate(ready, workers, probe)
    content = {
        "cells": len(ready.grid),
        "variants": len({(b.variant.model, b.variant.label) for b in ready.grid.blocks}),
        "cached": len(ready.cached),
        "failed": len(ready.failed),
        "tasks": len(ready.todo),
        **expected,
    }
    if json:
        common.print_json(content | {"impossible": {each.name: each.why for each in ready.grid.impossible}})
        return
    rows = [[name.replace("_", " "), _shown(name, value)] for name, value in content.items()]
    common.print_table(str(plan), ["", ""], rows)


def run_command(
    plan: Plan,
    store: Where = None,
    workers: Workers = 1,
    resident: Resident = None,
    skip_impossible: Skip = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Measure cells again that failed.")] = False,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="A Ray cluster, HOST:PORT or auto (extra `ray`), does the work."),
    ] = None,
    device: common.Device = "cpu",
    threads: common.Threads = None,
    json: common.Json = False,
) -> None:
    """Measure what is not in the store yet. Killed or stopped, it goes on when it is started again."""
    from qclip.study import forking

    if workers > 1 and ray is None:
        forking.start()
    from qclip.study.plan_file import read
    from qclip.study.progress import Counts
    from qclip.study.run import engine_of, prepare, run
    from qclip.study.store import StudyStore

    if ray is not None and workers > 1:
        raise InputError("--workers are processes of this machine, and --ray a cluster; give one of them")
    found = read(plan)
    where = store_of(plan, store)
    known = StudyStore.create(where)
    ready = prepare(
        found, known, threads, workers, resident, skip_impossible, retry_failed, device, common.say, ray is not None
    )
    for note in ready.notes:
        common.say(f"warning: {note}")
    for each in ready.grid.impossible:
        common.say(f"left out: {each.name}: {each.why}")
    counts = Counts(len(ready.grid), len(ready.cached), len(ready.failed), known, str(plan))
    with counts.shown(), live(counts):
        run(ready, engine_of(workers, ray), counts)
    state = counts.state()
    cells = ready.grid.cells()
    failed = {cell: why for cell, why in known.failed(ready.work.runtime).items() if cell in cells}
    for line in dict.fromkeys(f"failed: {w['variant']} on {w['evaluation']}: {w['error']}" for w in failed.values()):
        common.say(line)
    if json:
        common.print_json({name: state[name] for name in ("cells", "cached", "done", "failed", "elapsed", "seconds")})
    else:
        print(
            f"{state['cells']} cells: {state['cached']} were there, {state['done']} measured, {state['failed']} failed"
            f" ({state['elapsed']:.1f} s)\nstore: {known.where}\ntables: qclip study table {plan}"
        )
    if state["failed"]:
        raise typer.Exit(1)


def status_command(plan: Plan, store: Where = None, json: common.Json = False) -> None:
    """Show how far a plan is, and which runs are at it, from any shell."""
    from qclip.study.progress import running

    found, known, grid = recalled(plan, store)
    cells = grid.cells()
    with known.lock("store", shared=True):
        runtimes = {*known.runtimes(), *known.measured_under()}
        done = set().union(*(known.measured(runtime) for runtime in runtimes)) & cells
        failed = (set().union(*(known.failed(runtime) for runtime in runtimes)) & cells) - done
    content = {"cells": len(cells), "measured": len(done), "failed": len(failed), "runs": running(known)}
    if json:
        common.print_json(content)
        return
    common.print_table(str(plan), ["", ""], [[name, value] for name, value in content.items() if name != "runs"])
    for each in content["runs"]:  # type: ignore[attr-defined]
        left = "" if each["eta"] is None else f", {each['eta'] / 60:.0f} min left"
        print(
            printable(
                f"running on {each['host']} (pid {each['pid']}): {each['done']} cells, {each['left']} to go{left}"
            )
        )
        for worker, doing in each["doing"].items():
            print(printable(f"  {worker}: {doing}"))


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "not estimated"
    if name == "seconds":
        return (
            f"{value / 3600:.1f} h" if value >= 7200 else f"{value / 60:.1f} min" if value >= 120 else f"{value:.0f} s"
        )
    if name.endswith("bytes"):
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
    return str(value)
