"""Tables with a row for each model and a column for each thing that was measured of it."""

from __future__ import annotations

import dataclasses
import statistics
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
    counted: bool = True  # in a summary over columns

    @property
    def heading(self) -> Cell:
        return self.head or metric_heading(self.metric)

    def cell(self, row: dict[str, Any] | None) -> Cell:
        return probability_cell(row) if self.metric.endswith("_p") else value_cell(units.metric(self.metric), row)


def probability_cell(row: dict[str, Any] | None) -> Cell:
    return Cell(units.ABSENT if row is None or row["value"] is None else units.probability(row["value"]))


def by_model(
    index: Index, title: str, columns: Sequence[Column], note: str = "", unchanged: float | None = None
) -> list[Table]:
    """One table, or none where nothing of it was measured: columns and models without any row are left out.

    unchanged: of ratios the value that says "as before". Two columns then sum up those that are counted: the median,
    which no single explosion of a small denominator moves, and how many lie above `unchanged`.
    """
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
    counted = [k for k in kept if columns[k].counted]
    summed = unchanged is not None and len(counted) > 1
    head = [Cell("Model"), *(columns[k].heading for k in kept)]
    if summed and unchanged is not None:
        head += [Cell("Median", f"of the {len(counted)}"), Cell(f"Above {unchanged:g}", "how many of them")]
    body = []
    for model, rows in found.items():
        if any(rows[k] is not None for k in kept):
            cells = [columns[k].cell(rows[k]) for k in kept]
            if summed and unchanged is not None:
                cells += _summary(units.metric(columns[counted[0]].metric), [rows[k] for k in counted], unchanged)
            body.append([Cell(model), *cells])
    return [Table(title, head, body, note)] if body else []


def _summary(measure: units.Measure, rows: Sequence[dict[str, Any] | None], unchanged: float) -> list[Cell]:
    """Median and count above `unchanged` of the values that are there."""
    values = [row["value"] for row in rows if row is not None and row["value"] is not None]
    if not values:
        return [Cell(units.ABSENT)] * 2
    above = sum(value > unchanged for value in values)
    return [Cell(measure.value(statistics.median(values))), Cell(f"{above} of {len(values)}")]
