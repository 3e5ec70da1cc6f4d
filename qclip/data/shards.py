"""Which Parquet files a path stands for: one file, the files of a folder, or those that a pattern matches."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from qclip.data.files import shown, some
from qclip.data.listing import is_leftover
from qclip.errors import DataError, nearest
from qclip.files import why_not_a_file

_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d+)-of-(?P<count>\d+)")  # train-00000-of-00002.parquet


def parquet_files(path: Path, split: str | None = None) -> tuple[list[Path], bool, list[str]]:
    """The files, in the order of their names (numbers as numbers); whether `split` has chosen among them by their
    names (`train-00000-of-00002.parquet`); and notes on shards that are missing.

    Raises DataError where there is none, one is no regular file, or several splits lie together and none is chosen.
    """
    if os.path.isdir(path):
        found = [path / name for name in _names(path) if name.endswith(".parquet") and not is_leftover(name)]
        if not found:
            inside = [name for name in _names(path) if os.path.isdir(path / name) and not is_leftover(name)]
            hint = f"it has the folders {some(sorted(inside))}; name one." if inside else "check the path."
            raise DataError(f"{shown(path)} is a folder without .parquet files; {hint}")
    elif os.path.lexists(path) or not glob.has_magic(os.fspath(path)):
        if reason := why_not_a_file(path):
            raise DataError(f"{shown(path)} {reason}; name a Parquet file, a folder of them, or a pattern with *.")
        return [path], False, []
    else:
        found = [Path(name) for name in glob.glob(os.fspath(path))]
        if not found:
            raise DataError(f"{shown(path)}: no file matches; check the pattern.")
    for file in found:
        if reason := why_not_a_file(file):
            raise DataError(f"{shown(file)} {reason}; move it away, or name the files with a pattern.")
    found.sort(key=natural)
    splits = {m["split"]: None for file in found if (m := _SHARD.match(file.name))}
    chosen = split is not None and split in splits
    if chosen:
        found = [file for file in found if (m := _SHARD.match(file.name)) and m["split"] == split]
    elif len(splits) > 1:
        if split is not None:
            raise DataError(f"{shown(path)}: no split {split!r}; {nearest(split, splits)}")
        raise DataError(
            f"{shown(path)} holds the splits {some(list(splits))}; choose one with ?split={next(iter(splits))}."
        )
    return found, chosen, _missing(path, found)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise DataError(f"folder {shown(folder)} cannot be read ({error.strerror}); check its rights.") from None


def natural(path: Path) -> list[tuple[int, int | str]]:
    """Sorts names by the numbers in them: 2.tar before 10.tar."""
    parts = re.split(r"(\d+)", os.fspath(path))
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _missing(path: Path, files: list[Path]) -> list[str]:
    found = [m for file in files if (m := _SHARD.match(file.name))]
    if not found:
        return []
    count = max(int(m["count"]) for m in found)
    gone = count - len({int(m["number"]) for m in found})
    return [f"{shown(path)}: {gone} of {count} shards are not there, and their images are left out"] if gone > 0 else []
