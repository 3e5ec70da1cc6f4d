"""Covariate shift: sets of other origin with the classes of the first ID set."""

from __future__ import annotations

from .. import labelled
from ..index import Index
from ..parts import Cell, Panel, Table
from ..tabulated import Column, by_model
from ..verdicts import Question
from . import Section


class ShiftSection(Section):
    name = "shift"
    title = "Covariate shift"
    intro = "The same classes in images of another origin. Reliability diagrams are read as above."
    absent = "No set of another origin was given, so covariate shift was not measured."

    def questions(self, index: Index) -> list[Question]:
        return [
            Question("Covariate shift", metric, name, leading=metric == "top1")
            for name in index.shift_sets
            for metric in ("top1", "ece")
        ]

    def lines(self, index: Index) -> dict[str, list[Question]]:
        return {self.title: [q for q in self.questions(index) if q.leading]}

    def panels(self, index: Index) -> list[Panel]:
        sets = index.shift_sets
        return labelled.trajectory(index, sets) + labelled.diagrams(index, sets, open_ones=0)

    def tables(self, index: Index) -> list[Table]:
        columns = [
            Column("relative_drop", {"set": name}, Cell(name), paired=True)
            for name in (*index.id_sets, *index.shift_sets)
        ]
        drops = by_model(index, "Relative drop of accuracy", columns, unchanged=0) if index.shift_sets else []
        return labelled.tables(index, index.shift_sets) + labelled.details(index, index.shift_sets) + drops
