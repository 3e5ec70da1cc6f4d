"""Parquet sets of one file or many: encoded images, and labels or captions beside them."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from qclip.data import parquet_columns as columns
from qclip.data.decoding import decode
from qclip.data.files import shown
from qclip.data.imageset import ImageSet, UnreadableImage, digest_of, digest_of_rows
from qclip.data.parquet_columns import Columns
from qclip.data.shards import parquet_files
from qclip.errors import DataError, nearest
from qclip.files import open_regular

LARGEST_ROW_GROUP = 2 * 2**30  # bytes of one row group: what is held in memory at once
LARGEST_ROWS = 50_000_000
LARGEST_TEXTS = 2**28  # bytes of a text column that is read to see whether it names groups

# What pyarrow raises on damaged files; texts that are no UTF-8 are a ValueError.
_DAMAGED = (pa.ArrowException, OSError, ValueError, MemoryError)


class _ParquetImages:
    """Reads the image column one row group at a time and keeps the last one; one file is open at a time."""

    def __init__(self, files: list[Path], groups: list[list[int]], column: str) -> None:
        self.files, self.column = files, column
        self.groups = [(file, group) for file, counts in enumerate(groups) for group in range(len(counts))]
        self.starts = np.concatenate([[0], np.cumsum([count for counts in groups for count in counts])])
        self.first = np.concatenate([[0], np.cumsum([sum(counts) for counts in groups])])  # row of each file's first
        self.opened: tuple[int, pq.ParquetFile] | None = None
        self.held: tuple[int, Any] | None = None  # a row group's number, and its column or what is wrong with it
        self.lock = threading.Lock()

    @functools.cached_property
    def whole(self) -> str:
        """Digest of the files' contents and of the name of the image column."""
        found = []
        for path in self.files:
            try:
                with open_regular(path) as stream:
                    found.append(hashlib.file_digest(stream, "sha256").hexdigest())
            except OSError as error:
                raise DataError(f"{shown(path)} {error.strerror}; it was there a moment ago.") from None
        digest = found[0] if len(found) == 1 else digest_of(*found)
        return digest if self.column == Columns.image else digest_of(digest, self.column)

    def digest(self, rows: Sequence[int]) -> str:
        return digest_of_rows(self.whole, int(self.starts[-1]), rows)

    def _column(self, number: int) -> Any:
        if self.held is None or self.held[0] != number:
            self.held = None  # frees the old one before the new one is read
            file, group = self.groups[number]
            try:
                if self.opened is None or self.opened[0] != file:
                    self.opened = file, pq.ParquetFile(self.files[file])
                found = self.opened[1].read_row_group(group, columns=[self.column])[self.column]
            except _DAMAGED as error:
                found = f"row group {group} is damaged ({_first_line(error)})"
            self.held = number, found
        return self.held[1]

    def read(self, rows: Sequence[int]) -> Iterator[Image.Image | UnreadableImage]:
        return (self._one(int(row)) for row in rows)

    def _one(self, row: int) -> Image.Image | UnreadableImage:
        number = int(np.searchsorted(self.starts, row, "right")) - 1
        file = self.groups[number][0]
        where = f"{shown(self.files[file].name)} row {row - self.first[file]}"
        with self.lock:
            column = self._column(number)
            try:
                found = column if isinstance(column, str) else column[int(row - self.starts[number])].as_py()
            except (IndexError, *_DAMAGED) as error:  # fewer rows than the file says, or a path that is no text
                found = f"is damaged ({_first_line(error)})"
        if isinstance(found, str):
            return UnreadableImage(f"{where}: {found}.")
        if isinstance(found, dict):  # Hugging Face writes {bytes, path}
            if found["bytes"] is None and found.get("path"):
                return UnreadableImage(f"{where}: names the file {shown(found['path'])!r} and holds no bytes of it.")
            found = found["bytes"]
        return UnreadableImage(f"{where}: no image.") if found is None else decode(found, where)


def load_parquet(
    path: Path,
    spec: str,
    split: str | None = None,
    wanted: Columns | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ImageSet:
    """All rows of a Parquet file, of those in a folder, or of those that a pattern matches. `split`: those whose column
    `split` has that value, or the shards that are named after it. `wanted`: the columns to read, None the usual ones.
    `progress` is called as (what, done, in all). Images are read from the files when they are needed.

    Raises DataError where a file is no Parquet, has no usable image column, too large row groups or missing labels,
    or where files differ in columns or class names.
    """
    files, split_chosen, notes = parquet_files(path, split)
    names = wanted or Columns()
    first: pa.Schema | None = None
    classes: list[str] | None = None
    tables: list[pa.Table] = []
    groups: list[list[int]] = []  # rows in each row group, by file
    pathless = True
    for done, file_path in enumerate(files):
        file = _opened(file_path)
        schema, where = file.schema_arrow, shown(file_path)
        metadata = schema.metadata or {}
        if names.label != Columns.label and Columns.label in schema.names:
            metadata = {key: value for key, value in metadata.items() if key != b"classes"}  # those of column `label`
        if first is None:
            first = schema
            _check_columns(where, schema, names)
            classes = columns.class_names(where, metadata, names.label)
        else:
            _check_same(where, schema, first, shown(files[0]))
            if columns.class_names(where, metadata, names.label) != classes:
                raise DataError(f"{where}: its class names differ from those of {shown(files[0])}; read them apart.")
        groups.append(_row_groups(where, file))
        if sum(map(sum, groups)) > LARGEST_ROWS:
            raise DataError(f"{where}: its rows are more than the {LARGEST_ROWS} that are read.")
        pathless = pathless and _holds_no_bytes(file, names.image)
        tables.append(_table(where, file, names))
        if progress is not None:
            progress(f"reading {spec}", done + 1, len(files))
    if pathless and any(any(counts) for counts in groups):
        raise DataError(
            f"{shown(path)}: column {names.image!r} holds paths and no bytes; write the images themselves into the "
            "file (`datasets` does it with embed_external_files), or read their folder with folder:PATH."
        )
    table, where = pa.concat_tables(tables), shown(path)
    rows = np.arange(table.num_rows if table.num_columns else sum(map(sum, groups)), dtype=np.int64)
    if len(rows) != sum(map(sum, groups)):
        raise DataError(f"{where}: damaged (its columns have {len(rows)} rows, its images {sum(map(sum, groups))}).")
    labels, label_notes = None, []
    if names.label in table.column_names:
        labels, texts = columns.labels(where, table[names.label], names.label)
        if texts is not None:
            classes = texts
            label_notes.append(
                f"{spec}: column {names.label!r} holds texts: the {len(texts)} of them, sorted, are classes"
            )
    found = ImageSet(
        name=path.stem if "*" not in path.stem else path.parent.name or "parquet",
        spec=spec,
        classes=classes,
        labels=labels,
        captions=columns.captions(where, table[names.captions], names.captions)
        if names.captions in table.column_names
        else None,
        groups=columns.groups(table, {names.label, names.captions}),
        prompts=None,
        source=_ParquetImages(files, groups, names.image),
        rows=rows,
        notes=notes,
        label_notes=label_notes,
    )
    if split is None or split_chosen:
        return found
    if "split" not in table.column_names:
        raise DataError(f"{where}: no column 'split' to find {split!r} in; leave split= out.")
    values = np.array([str(v) for v in table["split"].to_pylist()])
    if not (values == split).any():
        raise DataError(f"{where}: no split {split!r}; {nearest(split, sorted(set(values.tolist())))}")
    return found.select(values == split)


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except _DAMAGED as error:
        raise DataError(f"{shown(path)}: not a readable Parquet file ({_first_line(error)}).") from error


def _check_columns(where: str, schema: pa.Schema, names: Columns) -> None:
    for option in ("image", "label", "captions"):
        name = getattr(names, option)
        count = schema.names.count(name)
        if count > 1:
            raise DataError(f"{where}: {count} columns are called {name!r}; rename all but one.")
        if count or (option != "image" and name == getattr(Columns, option)):
            continue
        listed = ", ".join(schema.names) or "no columns"
        how = f"; name another with ?{option}=NAME." if schema.names else "."
        raise DataError(f"{where}: no column {name!r}; it has {listed}{how}")
    kind = schema.field(names.image).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{where}: column {names.image!r} holds {kind}, not the bytes of encoded images.")


def _check_same(where: str, schema: pa.Schema, first: pa.Schema, whose: str) -> None:
    for name in (*first.names, *schema.names):
        here = schema.field(name).type if name in schema.names else "nothing"
        there = first.field(name).type if name in first.names else "nothing"
        if here != there:
            raise DataError(f"{where}: column {name!r} holds {here}, but {there} in {whose}; read them apart.")


def _row_groups(where: str, file: pq.ParquetFile) -> list[int]:
    """Rows in each row group."""
    metadata = file.metadata
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if size > LARGEST_ROW_GROUP:
            raise DataError(
                f"{where}: row group {group} needs {size} bytes; write it with row groups under {LARGEST_ROW_GROUP}."
            )
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _chunks(file: pq.ParquetFile, path: str) -> list[Any]:
    """What the file says of each part of a column."""
    metadata = file.metadata
    return [
        part
        for group in range(metadata.num_row_groups)
        for at in range(metadata.num_columns)
        if (part := metadata.row_group(group).column(at)).path_in_schema == path
    ]


def _holds_no_bytes(file: pq.ParquetFile, image: str) -> bool:
    """Whether every {bytes, path} has a path only, as far as the file's own counts say."""
    parts = _chunks(file, f"{image}.bytes")
    counted = [p.statistics for p in parts]
    return all(s is not None and s.has_null_count and s.num_values == 0 for s in counted) if parts else False


def _table(where: str, file: pq.ParquetFile, names: Columns) -> pa.Table:
    """Every column that is read at once: all but the images."""

    def is_wanted(name: str, kind: pa.DataType) -> bool:
        if name in (names.label, names.captions, "split"):
            return True
        small = columns.is_text(kind) and sum(p.total_uncompressed_size for p in _chunks(file, name)) < LARGEST_TEXTS
        return pa.types.is_boolean(kind) or small

    schema = file.schema_arrow
    wanted = [n for n in schema.names if n != names.image and is_wanted(n, schema.field(n).type)]
    try:
        return file.read(columns=wanted).select(wanted)
    except _DAMAGED as error:
        raise DataError(f"{where}: damaged ({_first_line(error)}).") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
