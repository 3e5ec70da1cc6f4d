"""Tables with a row for each model and a column for each thing that was measured of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from . import units
from .index import Index
from .parts import Cell, Table, metric_heading, value_cell


@dataclasses.dataclass(frozen=True)
class Column:
    """What stands in a column: a metric under a key (`Index.row`). paired: it is of a model and its reference."""

    metric: str
    key: dict[str, Any] = dataclasses.field(default_factory=dict)
    head: Cell | None = None
    paired: bool = False

    @property
    def heading(self) -> Cell:
        return self.head or metric_heading(self.metric)

    def cell(self, row: dict[str, Any] | None) -> Cell:
        return probability_cell(row) if self.metric.endswith("_p") else value_cell(units.metric(self.metric), row)


def probability_cell(row: dict[str, Any] | None) -> Cell:
    return Cell(units.ABSENT if row is None or row["value"] is None else units.probability(row["value"]))


def by_model(index: Index, title: str, columns: Sequence[Column], note: str = "") -> list[Table]:
    """One table, or none where nothing of it was measured: columns and models without any row are left out."""
    found: dict[str, list[dict[str, Any] | None]] = {}
    for cohort in index.cohorts:
        for model in cohort.models:
            if model in found:
                continue
            own = cohort.reference if model != cohort.reference else ""
            found[model] = [
                None if c.paired and not own else index.row(model, c.metric, reference=own if c.paired else "", **c.key)
                for c in columns
            ]
    kept = [k for k in range(len(columns)) if any(rows[k] is not None for rows in found.values())]
    body = [
        [Cell(model), *(columns[k].cell(rows[k]) for k in kept)]
        for model, rows in found.items()
        if any(rows[k] is not None for k in kept)
    ]
    return [Table(title, [Cell("Model"), *(columns[k].heading for k in kept)], body, note)] if body else []
