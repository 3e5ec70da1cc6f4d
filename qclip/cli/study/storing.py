"""`qclip study compact` and `gc`: a store that opens faster, and one that takes less room."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qclip.errors import InputError

from .. import common
from .arguments import Where, recalled, store_place


def compact_command(
    store: Annotated[str, typer.Argument(metavar="STORE", parser=store_place, help="The folder or URL of a store.")],
    json: common.Json = False,
) -> None:
    """Put the rows of many cells into one file, which opens faster."""
    from qclip.study.store import StudyStore
    from qclip.study.upkeep import compact

    before, after = compact(StudyStore.open(store))
    if json:
        common.print_json({"files_before": before, "files": after})
    else:
        print(f"{before} files of results are {after} now")


def gc_command(
    plans: Annotated[list[Path], typer.Argument(metavar="PLAN...", help="Plans whose cells are kept.")],
    store: Where = None,
    json: common.Json = False,
) -> None:
    """Remove what belongs to none of these plans, and all embeddings, which can be computed again."""
    from qclip.study.run import artifacts
    from qclip.study.upkeep import gc

    cells: set[str] = set()
    kept: set[str] = set()
    if store is None and len(plans) > 1:
        raise InputError("several plans share one store; name it with --store")
    for each in plans:
        _, known, grid = recalled(each, store)
        cells |= grid.cells()
        kept |= {key for key in artifacts(grid).values() if key}
    removed, size = gc(known, cells, kept)
    if json:
        common.print_json({"files": removed, "bytes": size})
    else:
        print(f"{removed} files removed, {size / 1e6:.1f} MB")
