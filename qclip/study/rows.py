"""A cell's rows as an Arrow table: the columns of `Results`, and which cell they are of."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qclip.metrics import metric
from qclip.results import COLUMNS, Results, Row
from qclip.results.table import FLOAT_COLUMNS, INTEGER_COLUMNS

from .cells import Block

# What is put before the columns of `Results`: the cell's hash, the runtime's, the variant of the model, the labelled
# set of its evaluation, and what it was calibrated on. `seed` is that of calibration.
OWN = ("cell", "runtime", "variant", "evaluation", "calibration", "threads")
VOLATILE = ("host", "seconds", "threads", "runtime")  # columns that say where and how fast
TIMED = ("ms_per_image",)  # metrics that differ between any two runs


def _type(column: str) -> pa.DataType:
    if column in INTEGER_COLUMNS or column == "threads":
        return pa.int64()
    return pa.float64() if column in FLOAT_COLUMNS else pa.string()


SCHEMA = pa.schema([(name, _type(name)) for name in (*OWN, *COLUMNS, "reason")])
TEXTS = [field.name for field in SCHEMA if pa.types.is_string(field.type)]


def of_cells(rows: pa.Table, cells: Collection[str]) -> Any:
    """Which rows are of these cells, as an Arrow mask."""
    return pc.is_in(rows["cell"], value_set=pa.array(sorted(cells), pa.string()))


def table(
    results: Results, label: str, block: Block, cell: str, runtime: str, threads: int, seconds: float
) -> pa.Table:
    """The rows of one cell. model: the plan's name; a value that is undefined is NaN, and `reason` says why. seconds:
    of the whole cell, where a row has none of its own."""
    own = {
        "cell": cell,
        "runtime": runtime,
        "variant": block.variant.label,
        "evaluation": block.sets.data,
        "calibration": block.variant.calibration or "",
        "threads": threads,
    }
    host = str(results.meta.get("cpu", ""))
    out = []
    for row in results.rows:
        undefined = row["value"] is None
        out.append(
            own
            | row
            | {
                "model": block.variant.model,
                "at": None if row["at"] is None else str(row["at"]),
                "value": math.nan if undefined else row["value"],
                "seed": block.variant.seed,
                "seconds": seconds if row["seconds"] is None else row["seconds"],
                "host": row["host"] or host,
                "reason": _reason(row, results.notes, label) if undefined else "",
            }
        )
    return pa.Table.from_pylist(out, SCHEMA)


def _reason(row: Row, notes: Iterable[str], label: str) -> str:
    """Why a value is undefined."""
    whole = [note for note in notes if note.startswith(f"{label}: ") and note.endswith("are undefined")]
    return whole[0] if whole else metric(row["metric"]).undefined or "its images do not tell it"


def results_row(row: dict[str, Any]) -> Row:
    """The row of `Results` that a stored one was, its model named by model and variant."""
    found = {column: row[column] for column in COLUMNS}
    found["value"] = None if found["value"] is None or math.isnan(found["value"]) else found["value"]
    found["model"] = row["variant"]
    found["at"] = _at(row["at"])
    return found


def _at(text: str | None) -> Any:
    if text is None:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
