"""Parquet sets: `image` (encoded bytes), `label` and / or `captions`; class names in the schema metadata."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from qclip.data.decoding import decode
from qclip.data.imageset import ImageSet, UnreadableImage
from qclip.errors import DataError, nearest

LARGEST_ROW_GROUP = 2 * 2**30  # bytes of one column in one row group: what is held in memory at once
LARGEST_ROWS = 50_000_000
MOST_GROUP_VALUES = 64  # a text column with more distinct values names images, not groups


class _ParquetImages:
    """Reads the image column one row group at a time and keeps the last one."""

    def __init__(self, path: Path, file: pq.ParquetFile) -> None:
        self.path, self.file = path, file
        counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.held: tuple[int, pa.ChunkedArray] | None = None
        self.lock = threading.Lock()

    def _column(self, group: int) -> pa.ChunkedArray:
        if self.held is None or self.held[0] != group:
            self.held = None  # frees the old one before the new one is read
            column = self.file.read_row_group(group, columns=["image"])["image"]
            if pa.types.is_struct(column.type):  # Hugging Face writes {bytes, path}
                column = pa.chunked_array([chunk.field("bytes") for chunk in column.chunks])
            self.held = group, column
        return self.held[1]

    def read(self, rows: Sequence[int]) -> list[Image.Image | UnreadableImage]:
        out: list[Image.Image | UnreadableImage] = []
        for row in rows:
            group = int(np.searchsorted(self.starts, row, "right")) - 1
            with self.lock:
                encoded = self._column(group)[int(row - self.starts[group])].as_py()
            where = f"{self.path.name} row {row}"
            out.append(UnreadableImage(f"{where}: no image.") if encoded is None else decode(encoded, where))
        return out


def load_parquet(path: Path, spec: str, split: str | None = None) -> ImageSet:
    """All rows of a Parquet file (`split`: those whose column `split` has that value).

    Raises DataError where the file is no Parquet, has no usable `image` column, too large row groups, or null labels.
    """
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}).") from error
    schema, metadata = file.schema_arrow, file.metadata
    if "image" not in schema.names:
        raise DataError(f"{path}: no column 'image'; it has {', '.join(schema.names) or 'no columns'}.")
    kind = schema.field("image").type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{path}: column 'image' holds {kind}, not the bytes of encoded images.")
    if metadata.num_rows > LARGEST_ROWS:
        raise DataError(f"{path}: {metadata.num_rows} rows are more than the {LARGEST_ROWS} that are read.")
    for group in range(metadata.num_row_groups):
        if metadata.row_group(group).total_byte_size > LARGEST_ROW_GROUP:
            raise DataError(
                f"{path}: row group {group} needs {metadata.row_group(group).total_byte_size} bytes; "
                f"write it with row groups under {LARGEST_ROW_GROUP}."
            )
    others = [n for n in schema.names if n != "image" and _is_wanted(n, schema.field(n).type)]
    try:
        table = file.read(columns=others)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: damaged ({str(error).splitlines()[0]}).") from error
    rows = np.arange(metadata.num_rows, dtype=np.int64)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    found = ImageSet(
        name=path.stem,
        spec=spec,
        classes=_classes(path, schema.metadata or {}),
        labels=_labels(path, table) if "label" in table.column_names else None,
        captions=_captions(path, table) if "captions" in table.column_names else None,
        groups=_groups(table),
        digest=digest,
        prompts=None,
        source=_ParquetImages(path, file),
        rows=rows,
    )
    if split is None:
        return found
    if "split" not in table.column_names:
        raise DataError(f"{path}: no column 'split' to find {split!r} in; leave split= out.")
    values = np.array([str(v) for v in table["split"].to_pylist()])
    if not (values == split).any():
        raise DataError(f"{path}: no split {split!r}; {nearest(split, sorted(set(values.tolist())))}")
    return found.select(values == split)


def _is_wanted(name: str, kind: pa.DataType) -> bool:
    return name in ("label", "captions", "split") or pa.types.is_boolean(kind) or pa.types.is_string(kind)


def _classes(path: Path, metadata: dict[bytes, bytes]) -> list[str] | None:
    if b"classes" not in metadata:
        return None
    try:
        names = json.loads(metadata[b"classes"])
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: `classes` in the schema metadata is not JSON ({error}).") from error
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise DataError(f"{path}: `classes` in the schema metadata is not a JSON list of names.")
    return names


def _labels(path: Path, table: pa.Table) -> NDArray[np.int64]:
    column = table["label"]
    if not pa.types.is_integer(column.type):
        raise DataError(f"{path}: column 'label' holds {column.type}, not integers.")
    if column.null_count:
        first = column.is_null().to_pylist().index(True)
        raise DataError(f"{path}: {column.null_count} labels are missing, the first in row {first}.")
    return column.to_numpy().astype(np.int64)


def _captions(path: Path, table: pa.Table) -> list[list[str]]:
    column = table["captions"]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return [[c] if c is not None else [] for c in column.to_pylist()]
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise DataError(f"{path}: column 'captions' holds {column.type}, not texts or lists of texts.")
    return [list(c or []) for c in column.to_pylist()]


def _groups(table: pa.Table) -> dict[str, NDArray]:
    """Bool columns, and text columns with few distinct values."""
    groups: dict[str, NDArray] = {}
    for name in table.column_names:
        column = table[name]
        if name in ("label", "captions") or column.null_count:
            continue
        if pa.types.is_boolean(column.type):
            groups[name] = np.array(column.to_pylist(), dtype=bool)
        elif pa.types.is_string(column.type) and len(column.unique()) <= MOST_GROUP_VALUES:
            groups[name] = np.array(column.to_pylist(), dtype=str)
    return groups
