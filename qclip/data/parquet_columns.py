"""Columns of a Parquet table to labels, class names, captions and groups."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qclip.errors import DataError

MOST_GROUP_VALUES = 64  # a text column with more distinct values names images, not groups


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    image: str = "image"
    label: str = "label"
    captions: str = "captions"


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def class_names(where: str, metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    """Names of the labels in schema metadata: those of Hugging Face's ClassLabel, else the JSON list `classes`."""
    features = _json(where, metadata, b"huggingface")
    for key in ("info", "features", label):
        features = features.get(key) if isinstance(features, dict) else None
    if isinstance(features, dict) and features.get("_type") == "ClassLabel" and features.get("names") is not None:
        return _names(where, f"`huggingface`: the names of {label!r}", features["names"])
    found = _json(where, metadata, b"classes")
    return None if found is None else _names(where, "`classes`", found)


def labels(where: str, column: pa.ChunkedArray, name: str) -> tuple[NDArray[np.int64], list[str] | None]:
    """Labels int64 `[n]`; where the column holds texts, positions in its sorted distinct texts, which come along."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if not (pa.types.is_integer(kind) or is_text(kind)):
        raise DataError(f"{where}: column {name!r} holds {kind}, not one integer or one name for each image.")
    if column.null_count:
        first = column.is_null().to_pylist().index(True)
        raise DataError(f"{where}: {column.null_count} labels are missing, the first in row {first}.")
    if is_text(kind):
        texts = _texts(where, name, column)
        names = sorted(set(texts))
        position = {text: k for k, text in enumerate(names)}
        return np.array([position[text] for text in texts], np.int64), names
    values = column.to_numpy()
    if values.dtype == np.uint64:
        values = np.minimum(values, np.uint64(2**63 - 1))  # no class has such a number, and it stays so
    return values.astype(np.int64), None


def captions(where: str, column: pa.ChunkedArray, name: str) -> list[list[str]]:
    """A text, or a list of texts, for each image."""
    kind = column.type
    if is_text(kind):
        return [[c] if c is not None else [] for c in _texts(where, name, column)]
    if not ((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_text(kind.value_type)):
        raise DataError(
            f"{where}: column {name!r} holds {kind}, not texts or lists of texts; write it as such, or name another."
        )
    return [[c for c in found or [] if c is not None] for found in _texts(where, name, column)]


def groups(table: pa.Table, used: set[str]) -> dict[str, NDArray]:
    """Bool columns, and text columns with few distinct values."""
    found: dict[str, NDArray] = {}
    for name in table.column_names:
        column = table[name]
        if name in used or column.null_count:
            continue
        if pa.types.is_boolean(column.type):
            found[name] = np.array(column.to_pylist(), dtype=bool)
        elif is_text(column.type) and len(column.unique()) <= MOST_GROUP_VALUES:
            found[name] = np.array(column.to_pylist(), dtype=str)
    return found


def _texts(where: str, name: str, column: pa.ChunkedArray) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: column {name!r} is damaged: its texts are not UTF-8 ({error.reason}).") from None


def _json(where: str, metadata: dict[bytes, bytes], key: bytes) -> Any:
    if key not in metadata:
        return None
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: `{key.decode()}` in the schema metadata is not JSON ({error}).") from None


def _names(where: str, what: str, names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise DataError(f"{where}: {what} in the schema metadata is not a JSON list of names.")
    return names
