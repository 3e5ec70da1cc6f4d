"""Folders of image files: each sub-folder is a class, or all images lie in one folder and have no labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qclip.data import classes as class_names
from qclip.data.decoding import LARGEST_BYTES, decode
from qclip.data.files import shown, some
from qclip.data.imageset import ImageSet, UnreadableImage
from qclip.data.listing import (
    LeftOut,
    entries,
    has_suffix,
    images_below,
    is_folder,
    is_image,
    is_leftover,
    unreadable_folder,
)
from qclip.errors import DataError, nearest
from qclip.files import open_regular
from qclip.progress import Progress


class Files:
    """Image files on disk, as a `Source`."""

    def __init__(self, root: str, files: list[str]) -> None:
        self.root, self.files = root, files
        self.hashes: dict[int, bytes] = {}  # of the files that were hashed, by row

    def digest(self, rows: Sequence[int]) -> str:
        """sha256 (hex) of the names and contents of these files alone; an unreadable one counts as its error."""
        whole = hashlib.sha256()
        for row in rows:
            if row not in self.hashes:
                self.hashes[row] = self._hash(self.files[row])
            whole.update(os.fsencode(os.path.relpath(self.files[row], self.root)) + b"\0" + self.hashes[row])
        return whole.hexdigest()

    def _hash(self, path: str) -> bytes:
        try:
            with open_regular(path) as stream:
                if os.fstat(stream.fileno()).st_size > LARGEST_BYTES:  # refused when it is read
                    return b""
                return hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            return str(error.strerror).encode()

    def read(self, rows: Sequence[int]) -> Iterator[Image.Image | UnreadableImage]:
        return (self._one(self.files[row]) for row in rows)

    def _one(self, path: str) -> Image.Image | UnreadableImage:
        where = shown(os.path.relpath(path, self.root))
        try:
            with open_regular(path) as stream:
                encoded = stream.read(LARGEST_BYTES + 1)
        except OSError as error:
            return UnreadableImage(f"{where}: {error.strerror}.")
        return decode(encoded, where)


def load_folder(
    root: Path,
    spec: str,
    classes: list[str] | None = None,
    split: str | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Images below `root` (or below `root/split`), in sorted order.

    With sub-folders each is a class; names that are all integers sort as integers (ImageNet-V2 has folders 0..999).
    `classes` are the lines of a classes file: `classes.renamed` says which label a sub-folder then has. `progress` is
    called as (what, done, in all). What is left out is in the set's `notes`.

    Raises DataError where there is no image, `classes` does not fit the sub-folders, two of them have the same name but
    for its spelling, or one cannot be read.
    """
    say = progress or (lambda what, done, total: None)
    say(f"listing {spec}", 0, 0)
    top = os.fspath(root)
    if split is not None:
        names = [entry.name for entry in _top(top) if is_folder(entry, links=True) and not is_leftover(entry.name)]
        if split not in names:
            hint = nearest(split, names) if names else "it has no sub-folders."
            raise DataError(f"{shown(top)}: no split {split!r}; {hint}")
        top = os.path.join(top, split)
    left_out = LeftOut(top)
    folders, loose = _sorted_out(top, left_out)
    labels: np.ndarray | None = None
    notes: list[str] = []
    files = [entry.path for entry in loose]
    if folders:
        names = [shown(entry.name) for entry in folders]
        class_names.refuse_twins(names, shown(top))
        places = np.arange(len(names))
        if classes is not None:
            places, notes = class_names.renamed(names, classes, shown(top))
        files, counts = [], []
        for done, entry in enumerate(folders):
            inside = list(images_below(entry.path, left_out))
            files += inside
            counts.append(len(inside))
            say(f"listing {spec}", done + 1, len(folders))
        if empty := [repr(name) for name, count in zip(names, counts, strict=True) if not count]:
            notes.append(f"{spec}: {len(empty)} class folders hold no image: {some(empty)}")
        labels = np.repeat(places, counts).astype(np.int64)
        classes = classes or names
    if not files:
        lines = "; ".join(left_out.notes("in it"))
        raise DataError(f"{shown(top)}: no images in it or its sub-folders{f' ({lines})' if lines else ''}.")
    return ImageSet(
        name=shown(os.path.basename(os.path.realpath(top))),
        spec=spec,
        classes=classes,
        labels=labels,
        captions=None,
        groups={},
        prompts=None,
        source=Files(top, files),
        rows=np.arange(len(files), dtype=np.int64),
        notes=left_out.notes(spec),
        label_notes=notes,
    )


def _top(path: str) -> list[os.DirEntry[str]]:
    try:
        return entries(path)
    except OSError as error:
        raise unreadable_folder(path, error) from None


def _sorted_out(top: str, left_out: LeftOut) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Class folders in the order of their labels, or else the images that lie in `top`."""
    folders, loose = [], []
    real = os.path.realpath(top)
    for entry in _top(top):
        if is_leftover(entry.name):
            left_out.add("which systems and editors leave behind", entry.path)
        elif is_folder(entry, links=True):
            target = os.path.realpath(entry.path) if entry.is_symlink() else None
            if target is not None and os.path.commonpath([target, real]) == target:
                left_out.add("links to a folder that they lie in", entry.path)
            elif has_suffix(entry.name) and not _top(entry.path):
                loose.append(entry)  # an empty folder called x.png was to be an image
            else:
                folders.append(entry)
        elif is_image(entry):
            loose.append(entry)
        else:
            left_out.add("no images", entry.path)
    if folders and loose:
        if stray := [entry for entry in loose if _is_file(entry)]:
            raise DataError(
                f"{shown(top)}: {len(stray)} images lie beside the class folders (the first is "
                f"{shown(stray[0].name)}); move them into one."
            )
        for entry in loose:
            left_out.add("no files, beside the class folders", entry.path)
    numbered = all(entry.name.isdecimal() for entry in folders)
    folders.sort(key=lambda entry: (int(entry.name) if numbered else 0, entry.name))
    return folders, loose


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link in a circle
        return False
