"""SigLIP's sigmoid: match or no match of each pair of an image and a class."""

from __future__ import annotations

from ..index import Index
from ..parts import Table
from ..tabulated import Column, by_model
from ..verdicts import Question
from . import Section

METRICS = ("pair_ece", "pair_nll")


class PairwiseSection(Section):
    name = "pairwise"
    title = "Sigmoid of pairs"
    intro = (
        "Calibration of the probability that an image and a class match, of models that were trained with a sigmoid."
    )
    absent = "No model has a sigmoid of its own (a logit bias)."
    tables_title = ""

    def questions(self, index: Index) -> list[Question]:
        found = dict.fromkeys((row["set"], row["metric"]) for row in index.rows(*METRICS))
        return [Question("Sigmoid of pairs", metric, name) for name, metric in found]

    def tables(self, index: Index) -> list[Table]:
        sets = dict.fromkeys(row["set"] for row in index.rows(*METRICS))
        return [t for name in sets for t in by_model(index, name, [Column(m, {"set": name}) for m in METRICS])]
