"""`qclip report`: results.json in, one HTML page out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from qclip import files
from qclip.errors import InputError

from . import common

EXAMPLES = (
    "[bold]Examples[/]\n\nqclip report results.json --output report.html\n\nqclip report results.json --json\n\n"
    "qclip report results.json --format every_eval_ever --output folder"
)


class Command(common.NamesInHelp):
    NAMED: ClassVar[dict[str, str]] = {"format": "qclip.reporting.exports:FORMATS"}


def command(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A results.json that `qclip evaluate` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", parser=common.output_path, help="Write the HTML page here."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="NAME", help="Write files of another tool's format into the folder --output."),
    ] = None,
    force: common.Force = False,
    json: common.Json = False,
) -> None:
    """Make the HTML page from results again, or show them as a table."""
    import qclip
    from qclip.reporting import page
    from qclip.reporting.exports import export

    if format is not None:
        if output is None:
            raise InputError("--format needs a folder for its files; name it with --output DIR")
        for path in export(qclip.Results.from_json(results), format, output, force):
            print(path)
        return
    if output is not None:
        if os.path.isdir(output):
            files.check_folder(output, (page.FILE,), force)
        page.check_output(output, force)
        common.keep_input(output, [str(results)])
    found = qclip.Results.from_json(results)
    if output is not None:
        output = page.report(found, output, force=force)
    if json:
        common.print_json({"report": None if output is None else str(output), "notes": found.notes, "rows": found.rows})
        return
    print(qclip.table(found))
    if output is not None:
        print(f"\nreport: {output}")
