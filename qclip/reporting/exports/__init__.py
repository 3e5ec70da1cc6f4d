"""Results in the formats of other tools, one per file: what `qclip report --format NAME` writes.

Another package adds one by an entry point of the group `qclip.formats`, a script by `FORMATS.register`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from qclip import files
from qclip.errors import InputError
from qclip.registry import Registry
from qclip.results import Results


class Format(Protocol):
    name: str
    label: str

    def __call__(self, results: Results) -> Mapping[str, str]:
        """Name of a file, without folders -> its text. Empty where the results hold nothing that the format knows."""
        ...


_HERE = "qclip.reporting.exports"
FORMATS: Registry[Format] = Registry(
    "format",
    "qclip.formats",
    {
        "clip_benchmark": f"{_HERE}.clip_benchmark:ClipBenchmark",
        "openood": f"{_HERE}.openood:OpenOod",
        "every_eval_ever": f"{_HERE}.every_eval_ever:EveryEvalEver",
    },
    ("label", "__call__"),
)


def export(results: Results, name: str, folder: str | os.PathLike[str], force: bool = False) -> list[Path]:
    """Write results in another tool's format into a folder, all files or none; returns them.

    Raises InputError where the format is unknown or the results hold nothing for it, OutputExistsError where a file is
    there and `force` is not given.
    """
    made = FORMATS.made(name)(results)
    if not made:
        raise InputError(f"the results hold nothing that {FORMATS.made(name).label} has a place for")
    files.check_folder(folder, tuple(made), force)
    with files.whole_folder(folder, last=list(made)[-1]) as part:
        for file, text in made.items():
            (part / file).write_text(text, encoding="utf-8")
    return [Path(folder) / file for file in made]


def apart(names: Iterable[str]) -> list[str]:
    """Names of files, each once: one that was there before gets a number, as what stands under it would be lost."""
    taken: set[str] = set()
    out = []
    for name in names:
        stem, _, ending = name.rpartition(".")
        found, count = name, 1
        while found.casefold() in taken:
            count += 1
            found = f"{stem}-{count}.{ending}"
        taken.add(found.casefold())
        out.append(found)
    return out


def part_of_name(text: str) -> str:
    """Text as a part of a file's name."""
    return re.sub(r"[^\w.\-]+", "-", text).strip("-.") or "unnamed"
