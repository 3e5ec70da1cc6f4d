"""What several commands share: options, progress on stderr, results on stdout, output that is whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from qclip.errors import InputError, OutputExistsError

Progress = Callable[[str, int, int], None]

Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", metavar="RECIPE", help="Name, JSON file or `float`; repeatable. See `qclip recipes`."),
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", metavar="DATA", help="Images for recipes that need data: KIND:PATH.")
]
Classes = Annotated[
    Path | None, typer.Option("--classes", metavar="FILE", help="Class names, one a line, in the order of the labels.")
]
Arch = Annotated[
    str | None, typer.Option("--arch", metavar="NAME", help="Architecture of a checkpoint file, if it does not say.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; torch's own choice without it.")]
Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="Names, files, artifact folders; the first is the reference.")
]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep embeddings in the user's cache folder, and use those there.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an output that is there already.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and only JSON, on stdout.")]


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def say(message: str) -> None:
    """One line for a person, on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table on stdout; numbers are right-aligned. Piped, it keeps its full width instead of being cut."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, markup=False, highlight=False, soft_wrap=True)
    console.print(title, style="bold")
    if rows:
        console.print(table, soft_wrap=False)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A bar with an ETA on stderr, driven by `report(what, done, total)`. Without a terminal: a line every tenth, at
    most one a second."""
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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield update


def refuse_existing(target: Path, force: bool) -> None:
    """Before the long work: an output that holds something is not overwritten unasked. Raises OutputExistsError."""
    if force or not target.exists():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    raise OutputExistsError(f"{target} exists already; name another --output, or give --force to overwrite it")


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A fresh folder to write files into; on success they move into `folder`, replacing files of the same name, and
    on any failure, Ctrl-C too, nothing of them is left."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder as --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.part"
    part.mkdir()
    try:
        yield part
        folder.mkdir(exist_ok=True)
        for path in sorted(part.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print(results.to_json(Path(folder) / "results.json").read_text(encoding="utf-8"), end="")
