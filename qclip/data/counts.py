"""How many people chose each class of each image: a Parquet file beside a set, as CIFAR-10H has it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qclip.data import classes as class_names
from qclip.data.files import shown
from qclip.data.imageset import ImageSet
from qclip.errors import DataError
from qclip.files import why_not_a_file

PREFIX = "n_"  # of a column that counts those who chose the class behind it


def add_counts(data: ImageSet, path: str) -> None:
    """Gives `data` the counts in a Parquet file: a column `n_NAME` for each class, or one column `counts` of lists in
    the order of the classes. The row of an image is the one whose `index` is the image's row in its set; without such a
    column it is the row of the same number.

    Raises DataError where the file is missing or no such table, a class has no column, a row is missing, a count is no
    whole number of people, or what most people chose is mostly not the label: then the rows are those of other images.
    """
    where = f"counts file {shown(path)!r}"
    labels, classes = data.labelled()
    table = _table(where, Path(os.path.expanduser(path)))
    counts = _columns(where, table, classes, data.spec)
    rows = np.arange(len(counts))
    if "index" in table.column_names:
        rows = _whole(where, table["index"], "index")
        if len(np.unique(rows)) != len(rows):
            raise DataError(f"{where}: an index stands in it twice; keep one row for each image.")
    order = np.argsort(rows)
    at = np.searchsorted(rows[order], data.rows)
    found = (at < len(rows)) & (rows[order][np.minimum(at, len(rows) - 1)] == data.rows)
    if not found.all():
        raise DataError(
            f"{where}: {np.sum(~found)} of {len(data)} images of {data.spec} have no row in it, the first is row "
            f"{data.rows[~found][0]}; it needs one for each image."
        )
    counts = counts[order][at]
    judged = counts.sum(1) > 0
    agree = np.mean(counts[judged].argmax(1) == labels[judged]) if judged.any() else 1.0
    if agree <= 0.5:
        raise DataError(
            f"{where}: what most people chose is the label of only {100 * agree:.0f} % of the images of {data.spec}; "
            "its rows or its classes are in another order."
        )
    data.counts = counts


def _table(where: str, path: Path) -> pa.Table:
    if reason := why_not_a_file(path):
        raise DataError(f"{where} {reason}; name a Parquet file with a row for each image.")
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{where} is not a readable Parquet file ({str(error).splitlines()[0]}).") from None


def _columns(where: str, table: pa.Table, classes: list[str], spec: str) -> NDArray[np.int64]:
    if not len(table):
        raise DataError(f"{where} has no rows.")
    if "counts" in table.column_names:
        column = table["counts"]
        kind = column.type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        listed = column.to_pylist() if lists and pa.types.is_integer(kind.value_type) else []
        if not listed or any(row is None or len(row) != len(classes) or None in row for row in listed):
            raise DataError(
                f"{where}: column 'counts' ({kind}) must hold {len(classes)} whole numbers for each image, one for "
                f"each class of {spec}."
            )
        found = np.array(listed, np.int64)
    else:
        names = [name for name in table.column_names if name.startswith(PREFIX)]
        if not names:
            raise DataError(f"{where} has no column 'counts' and none that begins with {PREFIX!r} (n_NAME).")
        of = [name.removeprefix(PREFIX) for name in names]
        places = class_names.positions(of, classes, where, spec)
        if places is None or len(places) != len(classes):
            raise DataError(f"{where}: its {len(names)} columns {PREFIX}NAME are not the {len(classes)} of {spec}.")
        found = np.empty((len(table), len(classes)), np.int64)
        for place, name in zip(places, names, strict=True):
            found[:, place] = _whole(where, table[name], name)
    if (found < 0).any():
        raise DataError(f"{where}: a count is negative; they are numbers of people.")
    return found


def _whole(where: str, column: pa.ChunkedArray, name: str) -> NDArray[np.int64]:
    if not pa.types.is_integer(column.type) or column.null_count:
        raise DataError(f"{where}: column {name!r} ({column.type}) must hold one whole number for each row.")
    return column.to_numpy().astype(np.int64)  # type: ignore[no-any-return]
