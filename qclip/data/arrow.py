"""Data sets of Hugging Face's `datasets`: objects that the user holds, and folders that `save_to_disk` wrote.

`datasets` itself is not needed: an object is asked for Arrow tables by its own methods, a folder holds Arrow files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from qclip.data import parquet_columns
from qclip.data.decoding import LARGEST_BYTES, decode
from qclip.data.files import shown
from qclip.data.imageset import ImageSet, UnreadableImage
from qclip.data.parquet_columns import Columns
from qclip.errors import DataError, nearest
from qclip.files import open_regular
from qclip.untrusted import read_json

ASKED_FOR = ("features", "column_names", "select_columns", "with_format")  # what an object of `datasets` has


class ArrowImages:
    """Encoded images in a column, as a `Source`. fetch: the value of a row, bytes or `{bytes, path}`."""

    def __init__(self, where: str, fetch: Callable[[int], Any], files: bool) -> None:
        self.where, self.fetch, self.files = where, fetch, files
        self.hashes: dict[int, bytes] = {}

    def digest(self, rows: Sequence[int]) -> str:
        """sha256 (hex) of the encoded images; an unreadable one counts as its error."""
        whole = hashlib.sha256()
        for row in rows:
            if row not in self.hashes:
                found = self._encoded(int(row))
                self.hashes[row] = hashlib.sha256(found if isinstance(found, bytes) else str(found).encode()).digest()
            whole.update(self.hashes[row])
        return whole.hexdigest()

    def read(self, rows: Sequence[int]) -> Iterator[Image.Image | UnreadableImage]:
        for row in rows:
            found = self._encoded(int(row))
            yield decode(found, f"{self.where} row {row}") if isinstance(found, bytes) else found

    def _encoded(self, row: int) -> bytes | UnreadableImage:
        where, found = f"{self.where} row {row}", self.fetch(row)
        if isinstance(found, dict):
            path, found = found.get("path"), found.get("bytes")
            if found is None and path and not self.files:
                return UnreadableImage(f"{where}: names the file {shown(path)!r} and holds no bytes of it.")
            if found is None and path:  # of the user's own object
                try:
                    with open_regular(path) as stream:
                        found = stream.read(LARGEST_BYTES + 1)
                except OSError as error:
                    return UnreadableImage(f"{where}: {shown(path)}: {error.strerror}.")
        return found if isinstance(found, bytes) else UnreadableImage(f"{where}: no image.")


def is_dataset(data: object) -> bool:
    """Whether this is a `datasets.Dataset`, or looks like one."""
    return all(hasattr(data, name) for name in ASKED_FOR) and hasattr(data, "__len__")


def from_dataset(data: Any, columns: Columns | None = None) -> ImageSet:
    """The images of a `datasets.Dataset` with the columns `image`, `label` (a ClassLabel's names are the classes, a
    text's values are) and `captions`; bool columns are subsets. Nothing is decoded before it is needed.

    Raises DataError where a column is not what it should be.
    """
    if not is_dataset(data):
        raise DataError(f"a {type(data).__name__} is no datasets.Dataset; of a DatasetDict give one split.")
    names = columns or Columns()
    info = getattr(data, "info", None)
    name = str(getattr(info, "dataset_name", None) or getattr(info, "builder_name", None) or "dataset")
    split = str(getattr(data, "split", None) or "")
    where = f"dataset {name}" + (f" ({split})" if split else "")
    if names.image not in data.column_names:
        raise DataError(f"{where}: no column {names.image!r}; {nearest(names.image, data.column_names)}")
    images = data.select_columns([names.image]).with_format("arrow")
    rest = [column for column in data.column_names if column != names.image]
    table = data.select_columns(rest).with_format("arrow")[:] if rest else None
    feature = data.features.get(names.label)
    source = ArrowImages(where, lambda row: images[row][names.image][0].as_py(), files=True)
    found = _image_set(where, name, where, source, len(data), table, getattr(feature, "names", None), names)
    if split:
        found.name = f"{name}-{split}"
    return found


def load_saved(path: Path, spec: str, split: str | None = None, columns: Columns | None = None) -> ImageSet:
    """A folder that `Dataset.save_to_disk` wrote, or `DatasetDict.save_to_disk` with its splits. Raises DataError."""
    names = columns or Columns()
    if (path / "dataset_dict.json").exists():
        splits = _listed(path / "dataset_dict.json", "splits")
        if (wanted := split or "test") not in splits:
            raise DataError(f"{shown(path)}: no split {wanted!r}; {nearest(wanted, splits)}")
        path = path / _below(path, wanted)
    elif split is not None:
        raise DataError(f"{shown(path)} holds one split; leave split= out.")
    where, state = shown(path), path / "state.json"
    if not state.exists():
        raise DataError(f"{where} is no saved data set (no state.json); `Dataset.save_to_disk` writes one.")
    files = [each.get("filename") if isinstance(each, dict) else None for each in _listed(state, "_data_files")]
    tables = [_opened(path / _below(path, name)) for name in files]
    try:
        table = pa.concat_tables(tables)
    except (pa.ArrowInvalid, ValueError) as error:
        raise DataError(f"{where}: its files do not fit each other ({_first(error)}).") from None
    if table.column_names.count(names.image) != 1:
        hint = nearest(names.image, table.column_names) if table.column_names else "it has no columns."
        raise DataError(f"{where}: no column {names.image!r}; {hint}")
    classes = parquet_columns.class_names(where, table.schema.metadata or {}, names.label)
    images = table[names.image]
    source = ArrowImages(where, lambda row: images[row].as_py(), files=False)
    rest = table.drop_columns([names.image])
    return _image_set(spec, path.name, where, source, table.num_rows, rest, classes, names)


def _image_set(
    spec: str,
    name: str,
    where: str,
    source: ArrowImages,
    count: int,
    table: pa.Table | None,
    classes: list[str] | None,
    names: Columns,
) -> ImageSet:
    there = table.column_names if table is not None else []
    labels, texts, notes = None, None, []
    if table is not None and names.label in there:
        labels, texts = parquet_columns.labels(where, table[names.label], names.label)
        if texts is not None:
            notes.append(f"{spec}: column {names.label!r} holds texts: the {len(texts)} of them, sorted, are classes")
    return ImageSet(
        name=name,
        spec=spec,
        classes=texts if texts is not None else None if classes is None else list(classes),
        labels=labels,
        captions=parquet_columns.captions(where, table[names.captions], names.captions)
        if table is not None and names.captions in there
        else None,
        groups={} if table is None else parquet_columns.groups(table, {names.label, names.captions}),
        prompts=None,
        source=source,
        rows=np.arange(count, dtype=np.int64),
        label_notes=notes,
    )


def _opened(path: Path) -> pa.Table:
    try:
        table = pa.ipc.open_stream(pa.memory_map(os.fspath(path))).read_all()
        table.validate(full=True)  # Arrow follows whatever offsets a file has, out of its memory, too
        return table
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{shown(path)}: not a readable Arrow file ({_first(error)}).") from None


def _listed(path: Path, key: str) -> list[Any]:
    found = read_json(path, DataError)
    listed = found.get(key) if isinstance(found, dict) else None
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{shown(path)}: {key!r} is no list of names; `save_to_disk` writes one.")
    return listed


def _below(path: Path, name: object) -> str:
    """A name out of a file that anybody may have written: it stays in its folder."""
    if not isinstance(name, str) or not name or name != os.path.basename(name) or name in (".", "..") or "\0" in name:
        raise DataError(f"{shown(path)}: {shown(str(name))!r} is no name of a file in it.")
    return name


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
