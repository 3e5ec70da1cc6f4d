"""What every model made of every image, as one Parquet table: for pandas, polars, DuckDB."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qclip.files import write_atomic

from .embedded import Embeddings
from .request import Request


def table(request: Request, embedded: Embeddings) -> pa.Table:
    """A row per model, condition and image.

    Columns: model, set, role, corruption (dictionaries), severity (int8), image (int64: position in the set), label,
    predicted, rank (int64; rank: classes before the label; null without labels), confidence, nll, brier (float64, null
    without labels), and a float64 column `score_NAME` for each OOD score, null where it was not asked for.
    """
    parts = []
    for condition in embedded.conditions:
        for model in request.models:
            outputs = embedded.outputs(condition).get(model)
            if outputs is None:
                continue
            n, labelled = len(outputs), len(outputs.labels) > 0
            columns: dict[str, pa.Array] = {
                name: pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), [value])
                for name, value in (
                    ("model", model),
                    ("set", condition.set.name),
                    ("role", condition.set.role),
                    ("corruption", condition.corruption),
                )
            }
            columns["severity"] = pa.array(np.full(n, condition.severity, np.int8))
            columns["image"] = pa.array(embedded.indices(condition))
            columns["predicted"] = pa.array(outputs.predicted.astype(np.int64))
            for name, values, kind in (
                ("label", outputs.labels, pa.int64()),
                ("rank", outputs.rank, pa.int64()),
                ("confidence", outputs.confidence, pa.float64()),
                ("nll", outputs.nll, pa.float64()),
                ("brier", outputs.brier, pa.float64()),
            ):
                columns[name] = pa.array(values, kind) if labelled else pa.nulls(n, kind)
            for score in request.scores:
                found = outputs.ood.get(score)
                columns[f"score_{score}"] = pa.nulls(n, pa.float64()) if found is None else pa.array(found)
            parts.append(pa.table(columns))
    return pa.concat_tables(parts).unify_dictionaries() if parts else pa.table({})


def write(request: Request, embedded: Embeddings, path: str | os.PathLike[str]) -> Path:
    """The table as a Parquet file, whole or not at all. Raises OutputError."""
    out = io.BytesIO()
    pq.write_table(table(request, embedded), out, compression="zstd")
    return write_atomic(path, out.getvalue())
