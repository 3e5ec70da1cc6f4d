"""May an index of the reference's embeddings be kept? Which neighbours a variant's queries still find in it."""

from __future__ import annotations

from .. import units
from ..index import Cohort, Index
from ..overview import MISSING, Axis, Mark
from ..parts import Cell, Table
from ..tabulated import Column, by_model
from ..verdicts import Answers
from . import Section
from .agreement import kept

HEADS = {
    "index_recall": Cell("New images", "ask the old index"),
    "index_recall_reverse": Cell("Old images", "ask a new index"),
    "text_recall": Cell("New texts", "ask the old index"),
    "text_recall_reverse": Cell("Old texts", "ask a new index"),
}
JUDGED = 10  # neighbours, where they were measured


class NeighboursSection(Section):
    name = "neighbours"
    title = "May I keep my float index?"
    intro = (
        "Of the k nearest neighbours that the reference finds in its own index, the share that is found again: by a "
        "variant's queries in the reference's index, and by the reference's queries in an index made anew. Labels play "
        "no part. How much has to be kept depends on what the search is for."
    )
    absent = "Neighbours were not compared, so nothing is said of keeping an index."
    tables_title = ""

    def overview(self, index: Index, cohort: Cohort, answers: Answers) -> list[Axis]:
        rows = index.rows("index_recall")
        name, k = next(((row["set"], _judged(index, row["set"])) for row in rows), ("", 0))
        marks = {model: _mark(index, cohort, model, name, k) for model in cohort.variants}
        return [Axis("Float index", f"The {k} nearest kept, {name}" if name else "", marks)]

    def tables(self, index: Index) -> list[Table]:
        out = []
        for name in dict.fromkeys(row["set"] for row in index.rows(*HEADS)):
            for k in _asked(index, name):
                key = {"set": name, "axis": "neighbours", "at": k}
                columns = [Column(metric, key, head, paired=True) for metric, head in HEADS.items()]
                out += by_model(index, f"The {k} nearest, {name}" if k != 1 else f"The nearest, {name}", columns)
        return out

    def sentences(self, index: Index) -> list[str]:
        out = []
        for cohort in index.cohorts:
            for axis in self.overview(index, cohort, {}) if cohort.reference else []:
                told = [f"{cohort.short(m)} {mark.whole}" for m, mark in axis.marks.items() if mark is not MISSING]
                if told:
                    out.append(f"{axis.basis}: {units.words(told)}.")
        return out


def _asked(index: Index, name: str) -> list[int]:
    return sorted({row["at"] for row in index.rows(*HEADS) if row["set"] == name and row["at"] is not None})


def _judged(index: Index, name: str) -> int:
    asked = _asked(index, name)
    return JUDGED if JUDGED in asked else asked[-1]


def _mark(index: Index, cohort: Cohort, model: str, name: str, k: int) -> Mark:
    row = index.row(model, "index_recall", set=name, axis="neighbours", at=k, reference=cohort.reference)
    return MISSING if row is None or row["value"] is None else kept("index_recall", row)
