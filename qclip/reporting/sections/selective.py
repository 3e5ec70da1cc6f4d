"""Selective prediction: what is wrong among the images of which a model is surest."""

from __future__ import annotations

from .. import svg, units
from ..index import Cohort, Index
from ..parts import (
    Figure,
    Panel,
    Table,
    csv,
    hundred,
    images_note,
    legend_of,
    listed,
    panel,
    portions,
    series_of,
    titled,
)
from ..tabulated import Column, by_model
from ..verdicts import Question
from . import Section

METRICS = ("aurc", "eaurc", "aurra", "coverage_transferred", "risk_transferred", "eaurc_approximate")


class SelectiveSection(Section):
    name = "selective"
    title = "Selective prediction"
    intro = (
        "The share of wrong answers among the images that are answered, where the least confident are left out. Lower "
        "is better; a curve that does not rise to the right says that confidence tells nothing. A threshold that was "
        "set with the reference accepts another share of images after quantization: that is coverage transferred."
    )
    absent = "No labelled set was evaluated, so there is no risk at less than full coverage."

    def questions(self, index: Index) -> list[Question]:
        return [
            Question("Selective prediction", metric, name) for name in index.id_sets for metric in ("aurc", "eaurc")
        ]

    def panels(self, index: Index) -> list[Panel]:
        return _curves(index)

    def tables(self, index: Index) -> list[Table]:
        sets = dict.fromkeys(row["set"] for row in index.rows(*METRICS))
        return [
            table
            for name in sets
            for table in by_model(index, name, [Column(m, {"set": name}) for m in METRICS], images_note(index.n(name)))
        ]


def _curves(index: Index) -> list[Panel]:
    """Risk against coverage, a figure for each labelled set."""
    found: dict[tuple[str, str], list[svg.Point]] = {}
    for curve in index.curves("risk_coverage"):
        pairs = zip(curve["points"]["coverage"], curve["points"]["risk"], strict=True)
        if points := [pair for pair in pairs if svg.finite(*pair)]:
            found[curve["model"], curve["set"]] = sorted(points)
    out, parts = [], portions(index)
    for cohort in parts:
        figures = []
        for name in dict.fromkeys(name for model, name in found if model in cohort.models):
            lines = {m: found[m, name] for m in cohort.models if (m, name) in found}
            figures.append(_figure(index, cohort, name, lines))
        title = "Risk at each coverage"
        out += panel(titled(cohort, title, len(index.cohorts) > 1), figures, legend_of(cohort), open_ones=2)
    return out


def _figure(index: Index, cohort: Cohort, name: str, lines: dict[str, list[svg.Point]]) -> Figure:
    known = [(m, index.row(m, "aurc", set=name)) for m in lines]
    measure = units.metric("aurc")
    areas = [
        f"{cohort.short(m)} {measure.value(row['value'])} {measure.interval(row['low'], row['high'])}".strip()
        for m, row in known
        if row is not None and row["value"] is not None
    ]
    caption = listed("AURC", areas)
    axes = svg.Axes(
        f"Risk against coverage on {name}",
        f"Share of wrong answers among the answered images. {caption}",
        (0, 1),
        svg.padded([y for points in lines.values() for _, y in points] + [0.0], floor=0, ceiling=1),
        x_label="images answered (%)",
        y_label="wrong among them (%)",
        x_text=hundred,
        y_text=hundred,
    )
    for model, series in series_of(cohort):
        axes.line(lines.get(model, []), series)
    rows = [(model, *point) for model, points in lines.items() for point in points]
    return Figure(name, axes.render(), caption, csv(("model", "coverage", "risk"), rows))
