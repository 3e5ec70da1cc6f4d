"""Of models that were measured together, under several conditions: what belongs to each cell."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qclip.results import Results

from .variants import FLOAT


def part_of(results: Results, label: str, condition: str, labels: list[str]) -> Results:
    """What was measured of one model under one condition; what belongs to no model is float's, but for what counts the
    models that happened to be measured together."""
    owners = (label, "") if label == FLOAT else (label,)
    rows = results.where(model=owners, corruption=condition)
    others = [re.compile(rf"(?<![\w-]){re.escape(each)}(?![\w-])") for each in labels if each not in (label, FLOAT)]
    notes = [note for note in results.notes if not any(other.search(note) for other in others)]
    meta = dict(results.meta)
    meta["models"] = {label: meta.get("models", {}).get(label, {})}
    kept = [row for row in rows.rows if row["model"] or not row["metric"].startswith("wins")]
    return Results(kept, notes, meta, rows.curves)


def images_by_cell(samples: pa.Table) -> dict[tuple[str, str], pa.Table]:
    """The outputs of images by model and condition, in their order. A group's mean has no images of its own."""
    keys = [pc.cast(samples[name], pa.string()).combine_chunks() for name in ("model", "corruption")]
    joined = pc.binary_join_element_wise(*keys, "\n").dictionary_encode()
    codes = joined.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(joined.dictionary) + 1))
    parts = {}
    for code, name in enumerate(joined.dictionary.to_pylist()):
        model, _, condition = name.rpartition("\n")
        parts[model, condition] = samples.take(pa.array(order[starts[code] : starts[code + 1]]))
    return parts
