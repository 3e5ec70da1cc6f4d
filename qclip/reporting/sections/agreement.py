"""How near each model's outputs are to those of its reference, image by image."""

from __future__ import annotations

from qclip.results import Row

from .. import units
from ..index import Cohort, Index
from ..overview import MISSING, Axis, Mark
from ..parts import Cell, Table
from ..tabulated import Column, by_model
from ..verdicts import Answers, changed
from . import Section


class AgreementSection(Section):
    name = "agreement"
    title = "Agreement with the reference"
    intro = "Image by image: how near the embeddings are, and how many predictions changed."
    absent = "There is no second model to agree with."
    tables_title = ""

    def overview(self, index: Index, cohort: Cohort, answers: Answers) -> list[Axis]:
        sets = [name for name in index.id_sets if any(r["set"] == name for r in index.rows("agreement"))][:1]
        marks = {}
        for model in cohort.variants:
            row = index.row(model, "agreement", set=sets[0], reference=cohort.reference) if sets else None
            marks[model] = MISSING if row is None or row["value"] is None else kept("agreement", row)
        return [Axis("Agreement", f"Same prediction, {sets[0]}" if sets else "", marks)]

    def tables(self, index: Index) -> list[Table]:
        return agreement(index)


def kept(metric: str, row: Row) -> Mark:
    """The mark of a share that is 1 where nothing changed."""
    measure = units.metric(metric)
    said = measure.value(row["value"])
    return Mark(changed(row), said, f"{said} {measure.interval(row['low'], row['high'])}".strip(), 1 - row["value"])


def agreement(index: Index) -> list[Table]:
    """How near each model's outputs are to its reference's, image by image."""
    heads = {
        "cosine_mean": Cell("Mean cosine", "of embeddings"),
        "cosine_min": Cell("Smallest", "cosine"),
        "kl": Cell("Divergence", "KL, nats"),
        "agreement": Cell("Same prediction"),
        "flips_all": Cell("Changed", "predictions"),
        "flips_lost": Cell("Lost", "right to wrong"),
        "flips_won": Cell("Won", "wrong to right"),
    }
    sets = dict.fromkeys(row["set"] for row in index.rows("agreement", "cosine_mean"))
    return [
        table
        for name in sets
        for table in by_model(index, name, [Column(m, {"set": name}, head, paired=True) for m, head in heads.items()])
    ]
