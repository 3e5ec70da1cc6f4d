"""What the commands of `qclip study` share: arguments, and the store of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qclip.study.cells import Grid
    from qclip.study.plan import Plan as TPlan
    from qclip.study.store import StudyStore


Plan = Annotated[Path, typer.Argument(metavar="PLAN", help="A TOML file; docs/studies.md shows what may stand in it.")]
Metrics = Annotated[
    list[str] | None, typer.Option("--metric", metavar="NAME", help="Repeatable. Default: top1, ece, auroc.")
]
Score = Annotated[
    str | None, typer.Option("--score", metavar="NAME", help="OOD score; default: mcm, or the plan's first.")
]


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


def store_of(plan: Path, store: str | None) -> str:
    return str(plan.with_suffix(".study")) if store is None else store


def recalled(plan: Path, store: str | None) -> tuple[TPlan, StudyStore, Grid]:
    """A plan as it was run last: without models and images."""
    from qclip.study.plan_file import read
    from qclip.study.run import recall
    from qclip.study.store import StudyStore

    found = read(plan)
    known = StudyStore.open(store_of(plan, store))
    return found, known, recall(found, known)
