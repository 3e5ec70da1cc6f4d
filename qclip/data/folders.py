"""Folders of image files: each sub-folder is a class, or all images lie in one folder and have no labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qclip.data.decoding import LARGEST_BYTES, decode
from qclip.data.imageset import ImageSet, UnreadableImage
from qclip.errors import DataError, nearest

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class _Files:
    def __init__(self, root: Path, files: list[Path]) -> None:
        self.root, self.files = root, files

    def read(self, rows: Sequence[int]) -> list[Image.Image | UnreadableImage]:
        return [self._one(self.files[row]) for row in rows]

    def _one(self, path: Path) -> Image.Image | UnreadableImage:
        where = str(path.relative_to(self.root))
        try:
            if path.stat().st_size > LARGEST_BYTES:
                return UnreadableImage(f"{where}: more than the {LARGEST_BYTES} bytes an image may have.")
            return decode(path.read_bytes(), where)
        except OSError as error:
            return UnreadableImage(f"{where}: cannot be read ({error.strerror}).")


def load_folder(root: Path, spec: str, classes: list[str] | None = None, split: str | None = None) -> ImageSet:
    """Images below `root` (or below `root/split`), in sorted order.

    With sub-folders each is a class; names that are all integers sort as integers (ImageNet-V2 has folders 0..999).
    `classes` names them in that order, or, where it contains every sub-folder's name, gives the label's position.
    Raises DataError where there is no image, or where `classes` does not fit the sub-folders.
    """
    if split is not None:
        names = [p.name for p in root.iterdir() if p.is_dir()]
        if split not in names:
            hint = nearest(split, names) if names else "it has no sub-folders."
            raise DataError(f"{root}: no split {split!r}; {hint}")
        root = root / split
    folders = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    numbered = bool(folders) and all(p.name.isdecimal() for p in folders)
    folders.sort(key=lambda p: int(p.name) if numbered else p.name)
    loose = _images(root, deep=False)
    if folders and loose:
        raise DataError(
            f"{root}: {len(loose)} images lie beside the class folders (the first is {loose[0].name}); "
            "move them into one."
        )
    labels: list[int] | None = None
    files = loose
    if folders:
        files, labels = [], []
        positions = _positions(root, [p.name for p in folders], classes)
        for folder, position in zip(folders, positions, strict=True):
            inside = _images(folder, deep=True)
            files += inside
            labels += [position] * len(inside)
        classes = classes or [p.name for p in folders]
    if not files:
        raise DataError(f"{root}: no images ({', '.join(sorted(SUFFIXES))}) in it or its sub-folders.")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        if path.stat().st_size <= LARGEST_BYTES:  # a larger one is refused when it is read
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return ImageSet(
        name=root.resolve().name,
        spec=spec,
        classes=classes,
        labels=None if labels is None else np.array(labels, np.int64),
        captions=None,
        groups={},
        digest=digest.hexdigest(),
        prompts=None,
        source=_Files(root, files),
        rows=np.arange(len(files), dtype=np.int64),
    )


def _images(folder: Path, deep: bool) -> list[Path]:
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(p for p in found if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())


def _positions(root: Path, folders: list[str], classes: list[str] | None) -> list[int]:
    """Label of each sub-folder."""
    if classes is None:
        return list(range(len(folders)))
    if set(folders) <= set(classes):
        return [classes.index(name) for name in folders]
    if len(folders) != len(classes):
        raise DataError(
            f"{root}: {len(folders)} sub-folders, but the classes file names {len(classes)} classes; "
            "it needs one line for each sub-folder, in sorted order."
        )
    return list(range(len(folders)))
