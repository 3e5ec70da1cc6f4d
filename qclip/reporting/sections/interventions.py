"""Controls and interventions that ran through the whole model: does reliability follow?"""

from __future__ import annotations

from .. import units
from ..index import Cohort, Index
from ..parts import Cell, Figure, Panel, Table, hundred, legend_of, panel, portions, titled, value_cell
from ..plots import Marks, along
from . import Section

MEASURED = ("top1", "ece", "nll", "auroc")
PLACES = ("control", "intervention")


class InterventionsSection(Section):
    name = "interventions"
    title = "Controls through the model"
    intro = (
        "Each control takes the place of the rounding error in every weight, in float arithmetic, and is measured like "
        "the quantized model. Where noise of the same size does the same, quantization is noise; where the weights "
        "with their level undone do, the shrink explains nothing; where a temperature gives the same ECE, calibration "
        "moved by one number. A filter by hand shows what losing the tail of the spectrum really does."
    )
    absent = "No control ran through the model: `qclip spectrum ... --data DATA --through` does that."
    tables_title = ""

    def panels(self, index: Index) -> list[Panel]:
        parts = portions(index)
        return [
            each
            for cohort in parts
            for each in panel(
                titled(cohort, "A filter by hand", len(parts) > 1), _filters(index, cohort), legend_of(cohort)
            )
        ]

    def tables(self, index: Index) -> list[Table]:
        return _controls(index)


def _filters(index: Index, cohort: Cohort) -> list[Figure]:
    """Dose and response: how a metric moves as the tail of the float weights is taken away."""
    out = []
    for metric in MEASURED:
        rows = [r for r in index.rows(metric) if r["axis"] == "filter" and not r["reference"]]
        for name, score in dict.fromkeys((row["set"], row["score"]) for row in rows):
            here = [row for row in rows if (row["set"], row["score"]) == (name, score)]
            marks: Marks = {}
            for row in here:
                marks.setdefault(row["model"], {})[row["at"]] = row
            measure = units.metric(metric)
            scale = 100.0 if measure.share else 1.0
            places = {row["at"]: f"{hundred(row['at'])} %" for row in here}
            title = f"{name}: {', '.join([measure.record.label, *[units.score(score)] * bool(score)])}"
            label = f"{measure.record.label} (%)" if measure.share else measure.name
            out += along(cohort, marks, title, label, places, "of the last band's amplitude removed", scale)
    return out


def _controls(index: Index) -> list[Table]:
    """Each quantized model, and each control and intervention in its place: a table for each set."""
    out = []
    rows = [r for m in MEASURED for r in index.rows(m) if r["axis"] in PLACES and not r["reference"]]
    for name in dict.fromkeys(row["set"] for row in rows):
        here = [row for row in rows if row["set"] == name]
        asked = list(dict.fromkeys((row["metric"], row["score"]) for row in here))
        lines = []
        for model in dict.fromkeys(row["model"] for row in here):
            own = [index.row(model, metric, set=name, score=score) for metric, score in asked]
            found = {("quantized", "itself"): own} if any(own) else {}
            for place in dict.fromkeys((row["axis"], row["at"]) for row in here if row["model"] == model):
                key = {"set": name, "axis": place[0], "at": place[1]}
                found[place] = [index.row(model, metric, score=score, **key) for metric, score in asked]
            for (axis, at), values in found.items():
                cells = [value_cell(units.metric(m), row) for (m, _), row in zip(asked, values, strict=True)]
                lines.append([Cell(model), Cell(str(at).replace("_", " "), axis), *cells])
        head = [Cell("Model"), Cell("In its place")]
        head += [Cell(units.metric(m).record.label, units.score(score) if score else "") for m, score in asked]
        note = "controls: mean of the draws, and where one more would fall; interventions: intervals over images"
        out.append(Table(f"Controls through the model, {name}", head, lines, note))
    return out
