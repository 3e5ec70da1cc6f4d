"""What several commands share: options, progress on stderr, results on stdout, output that is whole or not there."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

from qclip.errors import InputError, printable
from qclip.progress import Progress
from qclip.registry import Registry

from .process import say

Recipes = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="wXaY[-static][-METHOD], a JSON file or `float`; repeatable. See `qclip recipes`.",
    ),
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", metavar="DATA", help="Images for recipes that need data: KIND:PATH.")
]
Classes = Annotated[
    Path | None,
    typer.Option("--classes", metavar="FILE", help="Class names, one per line: found by name, else by position."),
]
Arch = Annotated[
    str | None, typer.Option("--arch", metavar="NAME", help="Architecture of a checkpoint file, if it does not say.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
# More threads than cores never help; more than the system grants would end the process in the middle of its work.
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=max(64, 4 * (os.cpu_count() or 1)),
        help="CPU threads; torch's own choice without it.",
    ),
]
Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Names, files, artifact folders; the first is the reference.")
]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep embeddings in the user's cache folder, and use those there.")
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, metavar="N", help="Seed of every random choice: 0 to 2^32 - 1.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an output that is there already.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and only JSON, on stdout.")]
Dev = Annotated[
    str | None, typer.Option("--dev", metavar="DATA", help="Labelled images on which temperatures are fitted.")
]
Train = Annotated[
    str | None, typer.Option("--train", metavar="DATA", help="Labelled images from which OOD scores learn.")
]
Negatives = Annotated[
    Path | None,
    typer.Option("--negatives", metavar="FILE", help="Words that are no class, one per line (NegLabel)."),
]
Templates = Annotated[
    Path | None, typer.Option("--templates", metavar="FILE", help="Prompts with a {} for the name, one per line.")
]
Texts = Annotated[Path | None, typer.Option("--texts", metavar="FILE", help="Texts to search images by, one per line.")]
Batch = Annotated[int, typer.Option("--batch", min=1, max=4096, help="Images at once.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at an unreadable image.")]


def registry_at(where: str) -> Registry:
    """The registry at "module:attribute". It is imported only here: `qclip --help` must not wait for torch."""
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)


class NamesInHelp(TyperCommand):
    """Says below each option of `NAMED` which names it takes, those of other packages too."""

    NAMED: ClassVar[dict[str, str]] = {}

    def format_help(self, ctx: Any, formatter: Any) -> None:
        told: list[Any] = [option for option in self.params if option.name in self.NAMED]
        plain = [option.help for option in told]
        try:
            for option in told:
                registry = registry_at(self.NAMED[option.name])
                option.help += f" Known {registry.kind}s: {', '.join(registry.names())}."
            super().format_help(ctx, formatter)
        finally:
            for option, text in zip(told, plain, strict=True):
                option.help = text


def output_path(text: str | Path) -> Path:
    """What --output names. An empty name would be the current folder."""
    if not os.fspath(text):
        raise typer.BadParameter("the name is empty; name a file or a folder")
    return Path(text)


ReportFolder = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", parser=output_path, help="Write report.html and results.json here."),
]


def keep_input(output: Path, inputs: list[str]) -> None:
    """Not even --force replaces what is being read. Raises InputError."""
    for name in inputs:
        same = False
        with contextlib.suppress(OSError, ValueError):
            same = os.path.samefile(output, name)
        if same:
            raise InputError(f"--output {str(output)!r} is what is read; name another file")


def finite(value: float | None) -> float | None:
    """For options that are real numbers: older versions of typer compare NaN with the bounds, and take it."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=not _unicode(), allow_nan=False))


def _unicode() -> bool:
    """Whether stdout takes every character; what takes only some gets JSON in ASCII."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table on stdout; numbers are right-aligned. Piped, it keeps its full width instead of being cut."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(printable(str(cell)) for cell in row))
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, markup=False, highlight=False, soft_wrap=True)
    console.print(title, style="bold")
    if rows:
        console.print(table, soft_wrap=False)


@contextlib.contextmanager
def progress(counted: bool = True) -> Iterator[Progress]:
    """A bar with an ETA on stderr, driven by `report(what, done, total)`. Without a terminal: a line per
    tenth of the work, at most one per second. Where what is done is no count of things but time (not `counted`), `what`
    says how much is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not sys.stderr.isatty():
        last, told = -1, float("-inf")

        def line(what: str, done: int, total: int) -> None:
            nonlocal last, told
            tenth = 10 * done // total if total else 0
            if tenth != last and time.monotonic() - told >= 1:
                last, told = tenth, time.monotonic()
                say(f"{10 * tenth:3d} %  {what}")

        yield line
        return
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=40 if counted else 12)]
    with Progress(
        *columns,
        *((MofNCompleteColumn(), TimeRemainingColumn()) if counted else ()),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield update


def command_line() -> str:
    """How this was called, for provenance."""
    import shlex

    return shlex.join(["qclip", *sys.argv[1:]])


def short_name(model: str) -> str:
    """A name for files and labels: the last part of a path, without what a file name cannot hold."""
    name = Path(model.removeprefix("local-dir:").removeprefix("hf:")).name
    for suffix in (".safetensors", ".pt", ".pth", ".bin"):
        name = name.removesuffix(suffix)
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".-") or "model"


def plain(value: Any) -> str:
    """A value of a JSON-able structure, for a table cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def print_results(results: Any) -> None:
    """The text that `Results.to_json` writes, on stdout."""
    print(results.text().rstrip() if _unicode() else json.dumps(json.loads(results.text()), indent=1))
