"""`qclip study`: a grid of models, recipes and sets, declared in a file, measured once, read as tables."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qclip import files
from qclip.errors import InputError

from . import common

if TYPE_CHECKING:
    from qclip.study.cells import Grid
    from qclip.study.plan import Plan as TPlan
    from qclip.study.progress import Counts
    from qclip.study.store import StudyStore

app = typer.Typer(no_args_is_help=True, help="A grid of models, recipes and sets, declared in a file, measured once.")

Plan = Annotated[Path, typer.Argument(metavar="PLAN", help="A TOML file; docs/study.md shows what may stand in it.")]
Metrics = Annotated[
    list[str] | None, typer.Option("--metric", metavar="NAME", help="Repeatable. Default: top1, ece, auroc.")
]
Score = Annotated[str, typer.Option("--score", metavar="NAME", help="OOD score.")]


def store_place(text: str) -> str:
    """A folder, or a URL as it is."""
    if not text:
        raise typer.BadParameter("the name is empty; name a folder or a URL")
    return text


Where = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="DIR|URL",
        parser=store_place,
        help="The store, a folder or an fsspec URL (s3://...); default: PLAN's name + .study.",
    ),
]
Workers = Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes that share the threads.")]
Resident = Annotated[
    int | None,
    typer.Option("--resident", min=1, max=4096, help="Variants in memory at once; default: as memory allows."),
]
Skip = Annotated[bool, typer.Option("--skip-impossible", help="Drop variants that cannot be made.")]


class Format(enum.StrEnum):
    markdown = "markdown"
    csv = "csv"
    latex = "latex"


@app.command(
    "plan", epilog="[bold]Examples[/]\n\nqclip study plan mine.toml\n\nqclip study plan mine.toml --workers 2 --json"
)
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
    from qclip.study.plan import read
    from qclip.study.run import prepare
    from qclip.study.store import StudyStore

    found = read(plan)
    where = _store_of(plan, store)
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


@app.command(
    "run",
    epilog="[bold]Examples[/]\n\nqclip study run mine.toml\n\nqclip study run mine.toml --workers 2 --retry-failed",
)
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
    from qclip.study.plan import read
    from qclip.study.progress import Counts
    from qclip.study.run import engine_of, prepare, run
    from qclip.study.store import StudyStore

    if ray is not None and workers > 1:
        raise InputError("--workers are processes of this machine, and --ray a cluster; give one of them")
    found = read(plan)
    where = _store_of(plan, store)
    known = StudyStore.create(where)
    ready = prepare(
        found, known, threads, workers, resident, skip_impossible, retry_failed, device, common.say, ray is not None
    )
    for note in ready.notes:
        common.say(f"warning: {note}")
    for each in ready.grid.impossible:
        common.say(f"left out: {each.name}: {each.why}")
    counts = Counts(len(ready.grid), len(ready.cached), len(ready.failed), known, str(plan))
    with counts.shown(), _live(counts):
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


@app.command(
    "status", epilog="[bold]Examples[/]\n\nqclip study status mine.toml\n\nqclip study status mine.toml --json"
)
def status_command(plan: Plan, store: Where = None, json: common.Json = False) -> None:
    """Show how far a plan is, and which runs are at it, from any shell."""
    from qclip.study.progress import running

    found, known, grid = _recalled(plan, store)
    cells = grid.cells()
    with known.lock("store", shared=True):
        runtimes = known.runtimes()
        done = set().union(*(known.measured(runtime) for runtime in runtimes)) & cells
        failed = (set().union(*(known.failed(runtime) for runtime in runtimes)) & cells) - done
    content = {"cells": len(cells), "measured": len(done), "failed": len(failed), "runs": running(known)}
    if json:
        common.print_json(content)
        return
    common.print_table(str(plan), ["", ""], [[name, value] for name, value in content.items() if name != "runs"])
    for each in content["runs"]:  # type: ignore[attr-defined]
        left = "" if each["eta"] is None else f", {each['eta'] / 60:.0f} min left"
        print(f"running on {each['host']} (pid {each['pid']}): {each['done']} cells, {each['left']} to go{left}")
        for worker, doing in each["doing"].items():
            print(f"  {worker}: {doing}")


@app.command(
    "table",
    epilog="[bold]Examples[/]\n\nqclip study table mine.toml\n\n"
    "qclip study table mine.toml --metric top1 --metric nll --corruption fog --format latex\n\n"
    "qclip study table mine.toml --format csv --output table.csv",
)
def table_command(
    plan: Plan,
    store: Where = None,
    metric: Metrics = None,
    score: Score = "mcm",
    corruption: Annotated[
        str | None, typer.Option("--corruption", metavar="NAME", help="At each severity, under this one alone.")
    ] = None,
    format: Annotated[Format, typer.Option("--format", help="Of the text.")] = Format.markdown,
    where: Annotated[
        bool, typer.Option("--with-host", help="In CSV, the host, threads and seconds of each value as well.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", parser=common.output_path, help="Write it here.")
    ] = None,
    force: common.Force = False,
) -> None:
    """Show what was measured: every variant beside float, differences with 95 % intervals, joint wins with chance."""
    from qclip.study import tables

    if output is not None:
        files.check_file(output, force)
    asked = tables.Asked(tuple(metric or tables.DEFAULT), score, corruption, where)
    found, known, grid = _recalled(plan, store)
    with known.lock("store", shared=True):
        there = tables.find(grid, known, asked)
        if format is Format.csv:
            text = tables.comma_separated(there, asked)
        else:
            made = tables.printed(there, known, asked)
            text = (tables.markdown if format is Format.markdown else tables.latex)(made, there.notes)
    if format is Format.csv:
        for note in there.notes:
            common.say(f"warning: {note}")
    if output is None:
        print(text, end="")
    else:
        files.write_atomic(output, text.encode())
        print(output)


@app.command(
    "choose",
    epilog="[bold]Examples[/]\n\nqclip study choose mine.toml --max-size 60MB --max-loss top1=0.5 --prefer ece\n\n"
    "qclip study choose mine.toml --max-latency 10ms --prefer auroc --json",
)
def choose_command(
    plan: Plan,
    store: Where = None,
    max_size: Annotated[
        str | None, typer.Option("--max-size", metavar="SIZE", help="Of the model in memory, as in 60MB.")
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option("--max-latency", metavar="TIME", help="Per image, as the study noted it in passing.")
    ] = None,
    max_loss: Annotated[
        list[str] | None,
        typer.Option("--max-loss", metavar="METRIC=POINTS", help="How much worse than float it may be; repeatable."),
    ] = None,
    prefer: Annotated[str, typer.Option("--prefer", metavar="METRIC", help="Decides among what is left.")] = "top1",
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Which evaluation; default: the plan's first.")
    ] = None,
    score: Score = "mcm",
    json: common.Json = False,
) -> None:
    """Name the variants that no other beats in everything, and pick one, with reasons."""
    from qclip.reporting import units
    from qclip.study import choose

    limits = choose.Limits(
        prefer,
        None if max_size is None else choose.size(max_size),
        None if max_latency is None else choose.milliseconds(max_latency),
        choose.losses(max_loss or []),
    )
    _, known, grid = _recalled(plan, store)
    with known.lock("store", shared=True):
        found = choose.choose(grid, known, limits, data, score)
    pick = None if found[0].why else found[0]
    if json:
        import dataclasses

        common.print_json(
            {"pick": None if pick is None else pick.name, "candidates": [dataclasses.asdict(each) for each in found]}
        )
    else:
        measure = units.metric(prefer)
        rows = []
        for each in found:
            why = "; ".join(each.why) or ("the pick" if each is pick else "")
            if each.beaten_by and each is not pick:
                why = "; ".join(
                    filter(None, (why, f"{each.beaten_by} is as good in everything, and better in something"))
                )
            lost = [
                units.ABSENT if name not in each.losses else f"{each.losses[name][0]:+.2f}" for name in limits.max_loss
            ]
            time = units.milliseconds(each.latency)
            rows.append(
                [each.name, units.size(each.size), time, measure.value(each.preferred), *lost, why or "not beaten"]
            )
        columns = ["variant", "size", "per image", prefer, *(f"loss of {name}" for name in limits.max_loss), ""]
        common.print_table(str(plan), columns, rows)
        if pick is not None:
            print(f"\npick: {pick.name}")
            for name, most in limits.max_loss.items():
                end = pick.losses[name][1]
                if end is not None and end > most:
                    print(f"its loss of {name} may be up to {end:.2f} (95 % interval), more than {most:g}")
    if pick is None:
        if not json:
            print("\nno variant keeps all limits")
        raise typer.Exit(1)


@app.command(
    "correlations",
    epilog="[bold]Examples[/]\n\nqclip study correlations mine.toml\n\n"
    "qclip study correlations mine.toml --metric ece --json",
)
def correlations_command(
    plan: Plan,
    store: Where = None,
    metric: Metrics = None,
    score: Score = "mcm",
    json: common.Json = False,
) -> None:
    """Whether variants whose spectra changed more also changed more in reliability (`spectra = true` in the plan)."""
    import dataclasses
    import math

    from qclip.reporting import units
    from qclip.study import correlations, tables

    _, known, grid = _recalled(plan, store)
    with known.lock("store", shared=True):
        found = correlations.correlations(grid, known, metric or tables.DEFAULT, score)
    if not found:
        raise InputError(f"{plan} measured no spectra; write spectra = true in its [statistics], and run it again")
    if json:
        told = [dataclasses.asdict(each) for each in found]
        plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in each.items()} for each in told]
        common.print_json({"family": len(found), "correlations": plain})
        return

    def shown(number: float, p: bool = False) -> str:
        return units.ABSENT if math.isnan(number) else units.probability(number) if p else f"{number:+.2f}"

    rows = [
        [f"{c.model} on {c.evaluation}", f"{c.measure} ({c.tower})", f"{c.metric} on {c.set}", c.n]
        + [shown(c.rho), shown(c.p, True), shown(c.holm_p, True)]
        for c in found
    ]
    common.print_table(str(plan), ["", "spectrum", "change of", "variants", "Spearman", "p", "Holm p"], rows)
    print(f"\np by permutation; Holm's family is these {len(found)} tests")


@app.command(
    "report",
    epilog="[bold]Examples[/]\n\nqclip study report mine.toml --output out\n\n"
    "qclip study report mine.toml --output out --metric top1 --metric nll --no-pages",
)
def report_command(
    plan: Plan,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", parser=common.output_path, help="Write index.html here.")
    ],
    store: Where = None,
    metric: Metrics = None,
    score: Score = "mcm",
    pages: Annotated[
        bool, typer.Option("--pages/--no-pages", help="And the reliability page of each variant beside it.")
    ] = True,
    force: common.Force = False,
) -> None:
    """Write heat maps of method by bits and size against each metric; each variant leads to its reliability page."""
    from qclip.study import page, tables

    page.check_output(output, force)
    _, known, grid = _recalled(plan, store)
    with known.lock("store", shared=True):
        _, count = page.write(grid, known, output, tables.Asked(tuple(metric or tables.DEFAULT), score), pages)
    print(f"report: {output / page.FILE} ({count} variants with a page of their own)")


@app.command("compact", epilog="[bold]Examples[/]\n\nqclip study compact mine.study")
def compact_command(
    store: Annotated[str, typer.Argument(metavar="STORE", parser=store_place, help="The folder or URL of a store.")],
    json: common.Json = False,
) -> None:
    """Put the rows of many cells into one file, which opens faster."""
    from qclip.study.store import StudyStore

    before, after = StudyStore.open(store).compact()
    if json:
        common.print_json({"files_before": before, "files": after})
    else:
        print(f"{before} files of results are {after} now")


@app.command("gc", epilog="[bold]Examples[/]\n\nqclip study gc mine.toml other.toml --store shared.study")
def gc_command(
    plans: Annotated[list[Path], typer.Argument(metavar="PLAN...", help="Plans whose cells are kept.")],
    store: Where = None,
    json: common.Json = False,
) -> None:
    """Remove what belongs to none of these plans, and all embeddings, which can be computed again."""
    from qclip.study.run import artifacts

    cells: set[str] = set()
    kept: set[str] = set()
    if store is None and len(plans) > 1:
        raise InputError("several plans share one store; name it with --store")
    for each in plans:
        _, known, grid = _recalled(each, store)
        cells |= grid.cells()
        kept |= {key for key in artifacts(grid).values() if key}
    removed, size = known.gc(cells, kept)
    if json:
        common.print_json({"files": removed, "bytes": size})
    else:
        print(f"{removed} files removed, {size / 1e6:.1f} MB")


def _store_of(plan: Path, store: str | None) -> str:
    return str(plan.with_suffix(".study")) if store is None else store


def _recalled(plan: Path, store: str | None) -> tuple[TPlan, StudyStore, Grid]:
    """A plan as it was run last: without models and images."""
    from qclip.study.plan import read
    from qclip.study.run import recall
    from qclip.study.store import StudyStore

    found = read(plan)
    known = StudyStore.open(_store_of(plan, store))
    return found, known, recall(found, known)


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


@contextlib.contextmanager
def _live(counts: Counts) -> Iterator[None]:
    """One table on a terminal; plain lines, at most one in ten seconds, elsewhere."""
    import sys

    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    told = time.monotonic()
    changed = counts.changed

    def line() -> str:
        state = counts.state()
        left = "" if state["eta"] is None else f", {state['eta']:.0f} s left"
        return (
            f"{state['done']} of {state['cells'] - state['cached']} cells measured, {state['cached']} cached, "
            f"{state['failed']} failed, {state['images_per_second']:.0f} images/s{left}"
        )

    if not sys.stderr.isatty():

        def plain(at_once: bool = False) -> None:
            nonlocal told
            changed(at_once)
            if time.monotonic() - told >= 10:
                told = time.monotonic()
                common.say(line())

        counts.changed = plain  # type: ignore[method-assign]
        yield
        return

    def look() -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_row(line())
        stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in counts.seconds.items())
        if stages:
            table.add_row(stages)
        for worker, doing in list(counts.doing.items()):
            table.add_row(f"{worker}: {doing}")
        return table

    with Live(console=Console(stderr=True), get_renderable=look, refresh_per_second=2, transient=True):
        yield
