"""Spurious correlation: accuracy of each group of a set."""

from __future__ import annotations

from .. import labelled
from ..index import Index
from ..parts import Panel, Table
from ..tabulated import Column, by_model
from ..verdicts import Question
from . import Section

GAPS = (("mean_worst_gap", False), ("rsg", False), ("vuln_add", True))  # and whether it is of a model and its reference


class GroupsSection(Section):
    name = "groups"
    title = "Spurious correlation"
    intro = (
        "Groups in which something else than the class - a background, a colour - goes with the class or against it. "
        "A model that leans on it is worse in the group where it misleads."
    )
    absent = "No set with groups was evaluated, so spurious correlation was not measured."

    def questions(self, index: Index) -> list[Question]:
        return [
            Question("Spurious correlation", metric, name, leading=metric == "worst_group_top1")
            for name in index.spurious_sets
            for metric in ("worst_group_top1", "group_gap")
        ]

    def lines(self, index: Index) -> dict[str, list[Question]]:
        return {"Worst group": [q for q in self.questions(index) if q.leading]}

    def panels(self, index: Index) -> list[Panel]:
        return labelled.diagrams(index, self._sets(index), open_ones=0)

    def tables(self, index: Index) -> list[Table]:
        extra = [
            table
            for name in index.spurious_sets
            for table in by_model(
                index, f"Spurious gaps, {name}", [Column(m, {"set": name}, paired=p) for m, p in GAPS]
            )
        ]
        return labelled.tables(index, self._sets(index)) + extra

    @staticmethod
    def _sets(index: Index) -> list[str]:
        return [name for name in index.spurious_sets if name not in index.id_sets]  # those stand with the accuracy
