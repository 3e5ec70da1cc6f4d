"""Predictions beside the labels that many people gave."""

from __future__ import annotations

from ..index import Index
from ..parts import Table
from ..tabulated import Column, by_model
from ..verdicts import Question
from . import Section

METRICS = ("human_nll", "entropy_correlation")


class HumanSection(Section):
    name = "human"
    title = "Human labels"
    intro = (
        "How probable a model finds what people chose (no NLL is below the people's own entropy), and whether it is "
        "unsure where they are."
    )
    absent = "No set says how many people chose each class."
    tables_title = ""

    def questions(self, index: Index) -> list[Question]:
        found = dict.fromkeys((row["set"], row["metric"]) for row in index.rows(*METRICS))
        return [Question("Human labels", metric, name, leading=metric == "human_nll") for name, metric in found]

    def tables(self, index: Index) -> list[Table]:
        sets = dict.fromkeys(row["set"] for row in index.rows(*METRICS))
        return [t for name in sets for t in by_model(index, name, [Column(m, {"set": name}) for m in METRICS])]
