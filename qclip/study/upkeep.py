"""A store that opens faster, and one that takes less room: what nobody may do while a run uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from qclip.errors import InputError

from .cells import CELL
from .folder import Folder
from .rows import SCHEMA, of_cells
from .store import MANY, StudyStore

OF_CELLS = ("results", "samples", "details", "failures")  # folders whose files are named by cells


def compact(store: StudyStore) -> tuple[int, int]:
    """Put the rows of each runtime into one file; (files before, files now). Raises InputError where a run uses the
    store."""
    before = after = 0
    with _alone(store):
        for runtime in store.measured_under():
            old = [name for _, name in store.named("results", runtime)]
            before += len(old)
            if len(old) > 1:
                order = [("variant", "ascending"), ("cell", "ascending")]
                kept = store.write_many(runtime, store.rows(runtime=runtime).cast(SCHEMA).sort_by(order))
                for name in old:
                    if name != kept:
                        store.files.remove(name)
            after += len(list(store.named("results", runtime)))
    return before, after


def gc(store: StudyStore, cells: Collection[str], artifacts: Collection[str]) -> tuple[int, int]:
    """Remove what belongs to none of these cells, quantized models whose keys are none of these, embeddings, and what
    killed runs left of quantizing; (files, bytes). Raises InputError where a run uses the store."""
    files = size = 0
    with _alone(store):
        doomed = [
            f"{kind}/{runtime}/{name}"
            for kind in OF_CELLS
            for runtime in store.files.children(kind)
            for name in store.files.children(f"{kind}/{runtime}")
            if name[:CELL] not in cells and not name.startswith(MANY)
        ]
        models = {*store.files.children("artifacts"), *Folder(store.folder).children("artifacts")}
        doomed += [f"artifacts/{name}" for name in sorted(models) if name.partition("-")[0] not in artifacts]
        for name in (*doomed, "embeddings", "methods"):
            count, bytes_ = store.files.remove(name)
            files, size = files + count, size + bytes_
        for runtime in store.measured_under():
            files += _thinned(store, runtime, cells)
    return files, size


def _thinned(store: StudyStore, runtime: str, cells: Collection[str]) -> int:
    """The files of many cells without those that are wanted no more; how many files were written again."""
    count = 0
    for cell, name in list(store.named("results", runtime)):
        if cell == MANY:
            rows = store.table(name)
            kept = rows.filter(of_cells(rows, cells))
            if len(kept) < len(rows):
                count += 1
                if len(kept):
                    store.write_many(runtime, kept)
                store.files.remove(name)
    return count


@contextlib.contextmanager
def _alone(store: StudyStore) -> Iterator[None]:
    with store.lock("store", wait=False) as mine:
        if not mine:
            raise InputError(f"a run is using {store.where!r}; wait until it has ended")
        yield
