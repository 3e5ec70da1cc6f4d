"""Tests of pairs beside the intervals, and joint wins beside chance."""

from __future__ import annotations

from qclip.metrics import metric as record

from .. import units
from ..index import Cohort, Index
from ..parts import Cell, Table
from ..tabulated import Column, by_model, probability_cell
from . import Section

ACROSS = tuple(f"{name}_wilcoxon" for name in ("top1", "ece", "nll", "auroc"))


class PairedSection(Section):
    name = "paired"
    title = "Paired tests and joint wins"
    intro = (
        "McNemar's test asks whether as many predictions were lost as won, DeLong's whether two AUROCs differ; neither "
        "is corrected for the number of tests. A joint win is a variant that is better in accuracy, ECE and AUROC at "
        "once; chance is that of resamples in which nothing differs and all correlations stay."
    )
    absent = "Nothing was tested in pairs."
    tables_title = "All tests"

    def sentences(self, index: Index) -> list[str]:
        return [line for cohort in index.cohorts for line in joint_wins(index, cohort)]

    def tables(self, index: Index) -> list[Table]:
        return _wins(index) + _mcnemar(index) + _delong(index) + _across(index)


def joint_wins(index: Index, cohort: Cohort) -> list[str]:
    """How many variants win in all three, beside what chance would give: one sentence for each OOD score that is
    judged."""
    out = []
    for row in index.rows("wins"):
        if row["reference"] != cohort.reference or row["value"] is None or row["score"] != index.judged_score:
            continue
        key = {"set": row["set"], "score": row["score"], "reference": row["reference"]}
        chance, p = index.row("", "wins_expected", **key), index.value("", "wins_p", **key)
        clear = index.value("", "wins_clear", **key)
        said = f"{row['value']:.0f} of {row['n']} variants {'is' if row['value'] == 1 else 'are'} better than "
        said += f"{cohort.reference} in accuracy, ECE and AUROC ({units.score(row['score'])}, {row['set']}) at once"
        said += "" if clear is None else f", {clear:.0f} with every interval clear of 0"
        if chance is not None and chance["value"] is not None and p is not None:
            ends = chance["low"], chance["high"]
            band = f"({ends[0]:.0f} to {ends[1]:.0f}) " if None not in ends else ""
            verdict = "more than chance" if p < 0.05 else "no more than chance gives"
            said += f"; {chance['value']:.1f} {band}would be by chance, p = {units.probability(p)}: {verdict}"
        out.append(said.replace("= <", "<") + ".")
    return out


def _wins(index: Index) -> list[Table]:
    rows = []
    for row in index.rows("wins"):
        key = {"set": row["set"], "score": row["score"], "reference": row["reference"]}
        cells = [Column(m).cell(index.row("", m, **key)) for m in ("wins", "wins_clear", "wins_expected", "wins_p")]
        where = f"{units.score(row['score'])}, {row['set']}"
        rows.append([Cell(where, f"{row['n']} variants against {row['reference']}"), *cells])
    head = [Cell("Score"), Cell("Joint wins"), Cell("Clear of chance", "every interval"), Cell("By chance"), Cell("p")]
    return [Table("Joint wins in accuracy, ECE and AUROC", head, rows)] if rows else []


def _mcnemar(index: Index) -> list[Table]:
    heads = {
        "flips_lost": Cell("Lost", "right to wrong"),
        "flips_won": Cell("Won", "wrong to right"),
        "mcnemar_p": Cell("McNemar", "mid-p"),
        "mcnemar_exact_p": Cell("McNemar", "exact"),
    }
    sets = dict.fromkeys(row["set"] for row in index.rows("mcnemar_p"))
    return [
        table
        for name in sets
        for table in by_model(
            index, f"McNemar, {name}", [Column(m, {"set": name}, h, paired=True) for m, h in heads.items()]
        )
    ]


def _delong(index: Index) -> list[Table]:
    sets = dict.fromkeys(row["set"] for row in index.rows("delong_p"))
    scores = dict.fromkeys(row["score"] for row in index.rows("delong_p"))
    out = []
    for name in sets:
        columns = [
            Column("delong_p", {"set": name, "score": s}, Cell("p", units.score(s)), paired=True) for s in scores
        ]
        out += by_model(index, f"DeLong, {name}", columns)
    return out


def _across(index: Index) -> list[Table]:
    rows = []
    for name in ACROSS:
        for row in index.rows(f"{name}_p"):
            key = {c: row[c] for c in ("set", "axis", "at", "score", "reference")}
            holm = index.row(row["model"], f"{name}_holm_p", **key)
            where = ", ".join(part for part in (row["set"], units.score(row["score"])) if part)
            label = record(name.removesuffix("_wilcoxon")).label
            shown = [probability_cell(each) for each in (row, holm)]
            rows.append([Cell(f"{row['at']}: {label}", where), Cell(units.count(row["n"])), *shown])
    head = [Cell("Recipe"), Cell("Models"), Cell("Wilcoxon", "p"), Cell("Holm", "p, corrected")]
    return [Table("One recipe over several models", head, rows)] if rows else []
