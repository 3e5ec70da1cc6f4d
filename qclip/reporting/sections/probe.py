"""A linear probe on each model's own embeddings."""

from __future__ import annotations

from ..index import Index
from ..parts import Table
from ..tabulated import Column, by_model
from ..verdicts import Question
from . import Section


class ProbeSection(Section):
    name = "probe"
    title = "Linear probe"
    intro = "Top-1 of a logistic regression fitted to each model's own image embeddings, whatever its text tower does."
    absent = "No training images were given, so no linear probe was fitted."
    tables_title = ""

    def questions(self, index: Index) -> list[Question]:
        sets = dict.fromkeys(row["set"] for row in index.rows("probe_top1"))
        return [Question("Linear probe", "probe_top1", name, leading=name in index.id_sets) for name in sets]

    def tables(self, index: Index) -> list[Table]:
        metrics = ("probe_top1", "probe_c")
        sets = dict.fromkeys(row["set"] for row in index.rows(*metrics))
        return [t for name in sets for t in by_model(index, name, [Column(m, {"set": name}) for m in metrics])]
