"""Detection of images of other classes, set by set and score by score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import svg, units
from ..index import Cohort, Index
from ..parts import (
    FIFTHS,
    Cell,
    Figure,
    Panel,
    Table,
    csv,
    hundred,
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

OTHER = "OOD detection"
AXES = {"near": "Near OOD detection", "far": "Far OOD detection"}


class OodSection(Section):
    name = "ood"
    title = "OOD detection"
    intro = (
        "How well a score separates images of known classes (ID) from others. The dashed diagonal is chance. FPR95 is "
        "the share of OOD images accepted where 95 % of ID images are."
    )
    absent = "No OOD set was given, so detection was not measured."

    def questions(self, index: Index) -> list[Question]:
        score = index.judged_score
        return [
            Question(AXES.get(kind, OTHER), metric, name, score=score, leading=metric == "auroc")
            for name, kind in index.ood_sets
            for metric in ("auroc", "fpr95")
        ]

    def lines(self, index: Index) -> dict[str, list[Question]]:
        leading = [question for question in self.questions(index) if question.leading]
        out = {axis: [q for q in leading if q.axis == axis] for axis in AXES.values()}
        other = [q for q in leading if q.axis not in out]
        return out | ({OTHER: other} if other else {})

    def panels(self, index: Index) -> list[Panel]:
        return roc(index)

    def tables(self, index: Index) -> list[Table]:
        return detection(index) + details(index)


def roc(index: Index) -> list[Panel]:
    """A panel of ROC curves per cohort: one figure for each OOD set, by the score that is judged."""
    curves: dict[tuple[str, str, str], list[svg.Point]] = {}
    for curve in index.curves("roc"):
        pairs = zip(curve["points"]["fpr"], curve["points"]["tpr"], strict=True)
        curves[curve["model"], curve["set"], curve["score"]] = [pair for pair in pairs if svg.finite(*pair)]
    scores = list(dict.fromkeys(score for _, _, score in curves))
    if not curves:
        return []
    score = index.judged_score if index.judged_score in scores else scores[0]
    kinds = dict(index.ood_sets)
    sets = [s for s, _ in index.ood_sets]
    sets += [s for s in dict.fromkeys(s for _, s, _ in curves) if s not in sets]
    out, parts = [], portions(index)
    for cohort in parts:
        figures = []
        for name in sets:
            lines = {m: sorted(curves[m, name, score]) for m in cohort.models if (m, name, score) in curves}
            if lines:
                figures.append(_roc_figure(index, cohort, name, kinds.get(name, ""), score, lines))
        out += panel(titled(cohort, f"By {units.score(score)}", len(index.cohorts) > 1), figures, legend_of(cohort))
    return out


def _roc_figure(
    index: Index, cohort: Cohort, name: str, kind: str, score: str, lines: dict[str, list[svg.Point]]
) -> Figure:
    shown = f"{name} ({kind} OOD)" if kind and kind not in name.lower() else name
    measure = units.metric("auroc")
    areas = [
        f"{cohort.short(m)} {measure.value(row['value'])} {measure.interval(row['low'], row['high'])}".strip()
        for m in lines
        if (row := index.row(m, "auroc", set=name, score=score)) is not None and row["value"] is not None
    ]
    caption = listed("AUROC", areas)
    axes = svg.Axes(
        f"ROC of OOD detection on {shown}",
        f"Share of ID images accepted against share of OOD images accepted. {caption}",
        (0, 1),
        (0, 1),
        x_label="OOD images accepted (%)",
        y_label="ID images accepted (%)",
        width=340,
        height=300,
        x_ticks=FIFTHS,
        y_ticks=FIFTHS,
        x_text=hundred,
        y_text=hundred,
    )
    axes.guide((0, 0), (1, 1))
    for model, series in series_of(cohort):
        if model in lines:
            axes.line([*lines[model], *([(1.0, 1.0)] if lines[model][-1][0] < 1 else [])], series)
    rows = [(m, *point) for m, points in lines.items() for point in points]
    return Figure(shown, axes.render(), caption, csv(("model", "fpr", "tpr"), rows))


def detection(index: Index) -> list[Table]:
    """A table per OOD set: AUROC and FPR95 by score."""
    return _tables(index, ("auroc", "fpr95"))


def _tables(index: Index, metrics: Sequence[str], title: str = "{}", paired: bool = False, **key: Any) -> list[Table]:
    """A table per OOD set with these metrics by each score."""
    out = []
    for name, kind in [*index.ood_sets, *((name, "") for name in index.ood_means)]:
        columns = [
            Column(metric, {"set": name, "score": score} | key, Cell(heading(metric), units.score(score)), paired)
            for score in index.ood_scores
            for metric in metrics
        ]
        n = None if name in index.ood_means else index.n(name)
        notes = [f"{kind} OOD"] * bool(kind) + [f"n = {units.count(n)}"] * bool(n)
        out += by_model(index, title.format(name), columns, ", ".join(notes))
    return out


def _drops(index: Index) -> list[Table]:
    """A table per score: the relative drop on each set, with the median over sets and how many lost."""
    out = []
    for score in index.ood_scores:
        columns = [
            Column("relative_drop_auroc", {"set": name, "score": score}, Cell(name), True, name not in index.ood_means)
            for name in [*(name for name, _ in index.ood_sets), *index.ood_means]
        ]
        out += by_model(index, f"Relative drop of AUROC, {units.score(score)}", columns, unchanged=0)
    return out


def heading(metric: str) -> str:
    return units.metric(metric).name


def details(index: Index) -> list[Table]:
    """AUPR, the reference's thresholds, relative drops, and scores that learned from the reference's embeddings."""
    out = _tables(index, ("aupr_in", "aupr_out"), "AUPR, {}")
    out += _tables(index, ("tpr_transferred", "fpr_transferred"), "At the reference's threshold, {}")
    out += _drops(index)
    for learned in dict.fromkeys(row["at"] for row in index.rows("auroc") if row["axis"] == "fitted_on"):
        title = "Scores that learned from " + str(learned).replace("{", "{{").replace("}", "}}") + ", {}"
        out += _tables(index, ("auroc", "fpr95"), title, axis="fitted_on", at=learned)
    return out
