"""A recipe of training beside its controls: what its gains are due to."""

from __future__ import annotations

from typing import Any

from .. import units
from ..controlled import Controlled, Difference
from ..index import Index
from ..parts import Cell, Table, value_cell
from . import Section


class ControlsSection(Section):
    name = "controls"
    title = "The recipe and its controls"
    intro = (
        "Means over seeds; the intervals hold images and seeds, p is corrected by Holm over this whole table. Every "
        "arm was trained on the same pairs, in the same order, for as many steps. A gain in calibration that is gone "
        "once the temperature of both is refitted was a temperature; one that a control has, too, is not the recipe's."
    )
    absent = "No recipe was trained beside controls."
    tables_title = ""

    def sentences(self, index: Index) -> list[str]:
        told = Controlled(index)
        return [f"{said}." for question in told.questions if (said := told.sentence(question))] if told else []

    def tables(self, index: Index) -> list[Table]:
        told = Controlled(index)
        return [_differences(told), _values(told)] if told else []


def _differences(told: Controlled) -> Table:
    against = [told.reference, *told.controls]
    rows = []
    for question in told.questions:
        cells = [_cell(told.difference(question, told.recipe, other)) for other in against]
        rows.append([Cell(question.name, question.place), *cells])
    head = [Cell("Metric"), *(Cell(f"to {other}") for other in against)]
    return Table(f"{told.recipe}: differences to float and to each control", head, rows)


def _cell(found: Difference | None) -> Cell:
    if found is None:
        return Cell(units.ABSENT)
    p = "" if found.p is None else f"; p {units.probability(found.p)}"
    return Cell(f"{found.verdict.symbol} {found.compared.difference}", f"{found.compared.interval}{p}")


def _values(told: Controlled) -> Table:
    rows = []
    for question in told.questions:
        key: dict[str, Any] = {"set": question.set, "corruption": question.corruption, "score": question.score}
        found = [told.index.row(arm, question.metric, **key) for arm in (told.reference, *told.arms)]
        rows.append([Cell(question.name, question.place), *(value_cell(question.measure, row) for row in found)])
    head = [Cell("Metric"), *(Cell(arm) for arm in (told.reference, *told.arms))]
    return Table("Each arm", head, rows)
