"""`qclip study table`, `correlations` and `report`: what was measured, as text and as a page."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from qclip import files
from qclip.errors import InputError

from .. import common
from .arguments import Metrics, Plan, Score, Where, recalled


class Format(enum.StrEnum):
    markdown = "markdown"
    csv = "csv"
    latex = "latex"


def table_command(
    plan: Plan,
    store: Where = None,
    metric: Metrics = None,
    score: Score = None,
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
    from qclip.study import formats, tables
    from qclip.study.found import DEFAULT, Asked, find

    if output is not None:
        files.check_file(output, force)
    asked = Asked(tuple(metric or DEFAULT), score, corruption, where)
    found, known, grid = recalled(plan, store)
    with known.lock("store", shared=True):
        there = find(grid, known, asked)
        if format is Format.csv:
            text = formats.comma_separated(there, asked)
        else:
            made = tables.printed(there, known, asked)
            text = (formats.markdown if format is Format.markdown else formats.latex)(made, there.notes)
    for name in metric or ():
        if not any(line["metric"].removeprefix("mean_") == name for line in there.lines):
            common.say(f"warning: nothing of {name!r} was measured")
    if format is Format.csv:
        for note in there.notes:
            common.say(f"warning: {note}")
    if output is None:
        print(text, end="")
    else:
        files.write_atomic(output, text.encode())
        print(output)


def correlations_command(
    plan: Plan,
    store: Where = None,
    metric: Metrics = None,
    score: Score = None,
    json: common.Json = False,
) -> None:
    """Whether variants whose spectra changed more also changed more in reliability (`spectra = true` in the plan)."""
    import dataclasses
    import math

    from qclip.reporting import units
    from qclip.study import correlations
    from qclip.study.found import DEFAULT

    _, known, grid = recalled(plan, store)
    with known.lock("store", shared=True):
        found = correlations.correlations(grid, known, metric or DEFAULT, score)
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


def report_command(
    plan: Plan,
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", parser=common.output_path, help="Write index.html here.")
    ],
    store: Where = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", metavar="NAME", help="That it can show; repeatable. Default: ten, if they were measured."
        ),
    ] = None,
    score: Score = None,
    pages: Annotated[
        bool, typer.Option("--pages/--no-pages", help="And the reliability page of each variant beside it.")
    ] = True,
    force: common.Force = False,
) -> None:
    """Write a page of heat maps of method by bits, model beside model, and of size or time against the metric, for a
    metric, a set or a corruption of the reader's choice; each variant leads to its reliability page."""
    from qclip.study import page
    from qclip.study.found import Asked

    page.check_output(output, force)
    _, known, grid = recalled(plan, store)
    with known.lock("store", shared=True):
        _, count = page.write(grid, known, output, Asked(tuple(metric or page.METRICS), score), pages)
    print(f"report: {output / page.FILE} ({count} variants with a page of their own)")
