"""Sets whose images are listed in text files beside them: Waterbirds, CelebA, and lists as OpenOOD has them."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from qclip.data.classes import read_lines
from qclip.data.files import shown, some
from qclip.data.folders import Files
from qclip.data.imageset import ImageSet
from qclip.errors import DataError, nearest

_LABEL = re.compile(r"-?[0-9]{1,9}")
SPLITS = {"train": "0", "val": "1", "test": "2"}  # as both data sets number them


def load_waterbirds(root: Path, spec: str, split: str | None = None) -> ImageSet:
    """Waterbirds (Sagawa et al. 1911.08731): `metadata.csv` names img_filename, y, split and place. Groups are the bird
    and what it is shown on. `split`: train, val or test, default test. Raises DataError."""
    where = f"{shown(root)}/metadata.csv"
    wanted = _split(where, split or "test")
    try:
        rows = list(csv.DictReader(read_lines(root / "metadata.csv", "metadata")))
    except csv.Error as error:
        raise DataError(f"{where} is no table of comma-separated values ({error}).") from None
    columns = ("img_filename", "y", "split", "place")
    lacking = [name for name in columns if name not in (rows[0] if rows else {})]
    if lacking:
        raise DataError(f"{where} has no column {lacking[0]!r}; it needs img_filename, y, split and place.")
    if torn := [number for number, row in enumerate(rows, 2) if None in map(row.get, columns)]:
        raise DataError(f"{where}: line {torn[0]} ends before its last column; the file is cut off or damaged there.")
    chosen = [row for row in rows if row["split"] == wanted]
    labels, places = (_flags(where, name, [row[name] for row in chosen], ("0", "1")) for name in ("y", "place"))
    birds = ["landbird", "waterbird"]
    names = [f"{bird} on {place}" for bird in birds for place in ("land", "water")]
    files = [row["img_filename"] for row in chosen]
    return _grouped("waterbirds", spec, root, where, files, birds, labels, names, 2 * labels + places, None, [])


def load_celeba(root: Path, spec: str, split: str | None = None) -> ImageSet:
    """CelebA (Liu et al. 1411.7766) with the groups of Sagawa et al.: hair that is blond or not, of men and of women.
    `list_attr_celeba.txt` and `list_eval_partition.txt` beside `img_align_celeba/`. `split` as in Waterbirds. Raises
    DataError."""
    where = f"{shown(root)}/list_attr_celeba.txt"
    wanted = _split(where, split or "test")
    lines = read_lines(root / "list_attr_celeba.txt", "attributes")
    names = lines[1].split() if len(lines) > 1 else []
    if "Blond_Hair" not in names or "Male" not in names:
        raise DataError(f"{where}: its second line names no Blond_Hair and Male; it has a count, names, and values.")
    partition = dict(
        _pair(line, "list_eval_partition.txt") for line in read_lines(root / "list_eval_partition.txt", "split")
    )
    values = {}
    for line in lines[2:]:
        file, *flags = line.split()
        if len(flags) != len(names):
            raise DataError(f"{where}: {shown(file)} has {len(flags)} values for {len(names)} attributes.")
        values[file] = flags
    if missing := [file for file in values if file not in partition]:
        raise DataError(f"{where}: {shown(missing[0])} is in no split of list_eval_partition.txt.")
    chosen = [file for file in values if partition[file] == wanted]
    blond, male = (
        _flags(where, name, [values[file][names.index(name)] for file in chosen], ("-1", "1"))
        for name in ("Blond_Hair", "Male")
    )
    hair = ["not blond", "blond"]
    count = len(lines) - 2
    torn = [] if lines[0] == str(count) else [f"{spec}: the first line says {shown(lines[0])} images, {count} follow"]
    groups = [f"{colour} {who}" for colour in hair for who in ("woman", "man")]
    files = [f"img_align_celeba/{file}" for file in chosen]
    prompts = ["a photo of a celebrity whose hair is {}."]
    return _grouped("celeba", spec, root, where, files, hair, blond, groups, 2 * blond + male, prompts, torn)


def load_list(path: Path, spec: str, root: str | None = None, classes: list[str] | None = None) -> ImageSet:
    """A list of OpenOOD (Zhang et al. 2306.09301): each line is a path below `root` (default: the list's own folder), a
    space, and a label; -1 is a class of none. The set has no labels where every line says so. Raises DataError."""
    where, files, labels = shown(path), [], []
    for number, line in enumerate(read_lines(path, "list"), 1):
        file, _, label = line.partition(" ")
        if not _LABEL.fullmatch(label := label.strip()):
            raise DataError(f"{where}: line {number} is no path, space, label: {shown(line)!r}.")
        labels.append(int(label))
        files.append(file)
    array = np.array(labels, np.int64)
    known = bool((array >= 0).any())
    notes = []
    if known and (array < 0).any():
        notes = [f"{spec}: {np.sum(array < 0)} of {len(array)} images are of no class (-1) and are left out"]
        files, array = [file for file, label in zip(files, array, strict=True) if label >= 0], array[array >= 0]
    return ImageSet(
        name=path.stem,
        spec=spec,
        classes=classes if known else None,
        labels=array if known else None,
        captions=None,
        groups={},
        prompts=None,
        source=_files(where, path.parent if root is None else Path(os.path.expanduser(root)), files),
        rows=np.arange(len(files), dtype=np.int64),
        notes=notes,
    )


def _grouped(
    name: str,
    spec: str,
    root: Path,
    where: str,
    files: list[str],
    classes: list[str],
    labels: NDArray[np.int64],
    groups: list[str],
    group: NDArray[np.int64],
    prompts: list[str] | None,
    notes: list[str],
) -> ImageSet:
    if not files:
        raise DataError(f"{where}: no image of that split; choose another one (?split=).")
    empty = [each for k, each in enumerate(groups) if not (group == k).any()]
    return ImageSet(
        name=name,
        spec=spec,
        classes=classes,
        labels=labels,
        captions=None,
        groups={"group": np.array(groups)[group]},
        prompts=prompts,
        source=_files(where, root, files),
        rows=np.arange(len(files), dtype=np.int64),
        notes=notes + [f"{spec}: {len(empty)} of {len(groups)} groups have no image: {some(empty)}"] * bool(empty),
    )


def _split(where: str, name: str) -> str:
    if name not in SPLITS:
        raise DataError(f"{where}: no split {name!r}; {nearest(name, SPLITS)}")
    return SPLITS[name]


def _pair(line: str, where: str) -> tuple[str, str]:
    parts = line.split()
    if len(parts) != 2:
        raise DataError(f"{where}: {shown(line)!r} is no file name and split.")
    return parts[0], parts[1]


def _flags(where: str, name: str, values: Sequence[str], known: tuple[str, str]) -> NDArray[np.int64]:
    """0 and 1 for what `known` calls no and yes."""
    if odd := [value for value in values if value not in known]:
        raise DataError(f"{where}: {name} is {shown(str(odd[0]))!r} of an image; it must be {known[0]} or {known[1]}.")
    return np.array([known.index(value) for value in values], np.int64)


def _files(where: str, root: Path, files: Sequence[str]) -> Files:
    """Raises DataError where a list leads out of its folder: it may be anybody's."""
    for file in files:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in file:
            raise DataError(f"{where}: {shown(file)!r} is no path below {shown(root)}.")
    return Files(os.fspath(root), [os.path.join(root, file) for file in files])
