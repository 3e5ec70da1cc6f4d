"""How near each model's outputs are to those of its reference, image by image."""

from __future__ import annotations

from .. import units
from ..index import Index
from ..parts import Cell, Table, value_cell
from . import Section


class AgreementSection(Section):
    name = "agreement"
    title = "Agreement with the reference"
    intro = "Image by image: how near the embeddings are, and how many predictions changed."
    absent = "There is no second model to agree with."
    tables_title = ""

    def tables(self, index: Index) -> list[Table]:
        return agreement(index)


def agreement(index: Index) -> list[Table]:
    """How near each model's outputs are to its reference's, image by image."""
    metrics = ("cosine_mean", "cosine_min", "agreement", "flips_lost", "flips_won", "mcnemar_p")
    heads = {
        "agreement": Cell("Same prediction"),
        "flips_lost": Cell("Lost", "right to wrong"),
        "flips_won": Cell("Won", "wrong to right"),
        "mcnemar_p": Cell("McNemar", "mid-p"),
        "cosine_mean": Cell("Mean cosine", "of embeddings"),
        "cosine_min": Cell("Smallest", "cosine"),
    }
    out = []
    sets = list(dict.fromkeys(row["set"] for row in index.rows("agreement", "cosine_mean")))
    for name in sets:
        rows = []
        for family in index.families:
            for model in family.variants:
                found = [index.row(model, m, set=name, reference=family.reference) for m in metrics]
                if any(found):
                    cells = [_agreement_cell(m, row) for m, row in zip(metrics, found, strict=True)]
                    rows.append([Cell(model), *cells])
        if rows:
            out.append(Table(name, [Cell("Model"), *(heads[m] for m in metrics)], rows))
    return out


def _agreement_cell(metric: str, row: dict | None) -> Cell:
    if row is None or row["value"] is None:
        return Cell(units.ABSENT)
    if metric.startswith("flips"):
        return Cell(units.count(row["value"]))
    if metric == "mcnemar_p":
        return Cell("< 0.001" if row["value"] < 0.001 else f"{row['value']:.3f}")
    return value_cell(units.metric(metric), row)
