"""What noise and other corruptions of growing severity do."""

from __future__ import annotations

from qclip.data.corruptions import GROUPS, MANY, members

from .. import svg, units
from ..index import Cohort, Index
from ..parts import (
    BOUNDS,
    Cell,
    Figure,
    Panel,
    Table,
    csv,
    hundred,
    images_note,
    legend_of,
    panel,
    portions,
    series_of,
    titled,
    value_cell,
)
from ..tabulated import Column, by_model
from ..verdicts import Question
from . import Section

FEW_CORRUPTIONS = 3  # as many are drawn openly
MOST_CURVES = 48  # figures of corruptions: all of ImageNet-C's, top-1 and ECE


class CorruptionsSection(Section):
    name = "corruptions"
    title = "Corruption robustness"
    intro = (
        "The same corrupted images for every model. Marks of one severity are set side by side a little, so that their "
        "intervals can be seen. These are each model's own; the paired differences above are sharper."
    )
    absent = "No corrupted images were evaluated, so robustness to corruptions was not measured."

    def questions(self, index: Index) -> list[Question]:
        grouped = {name for name, corruption in index.corrupted if corruption in GROUPS}
        several = len({corruption for _, corruption in index.corrupted}) > 1
        return [
            Question(
                f"{_named(corruption, several)} robustness",
                metric,
                name,
                corruption=corruption,
                leading=metric == "mean_top1" and (corruption in GROUPS or name not in grouped),
            )
            for name, corruption in index.corrupted
            for metric in ("mean_top1", "mean_ece")
        ]

    def lines(self, index: Index) -> dict[str, list[Question]]:
        return {"Noise and other corruptions": [q for q in self.questions(index) if q.leading]}

    def panels(self, index: Index) -> list[Panel]:
        return by_group(index) + by_severity(index)

    def tables(self, index: Index) -> list[Table]:
        return corrupted(index) + ratios(index)


def _named(corruption: str, several: bool) -> str:
    return units.corruption(corruption) if several else "Noise" if "noise" in corruption else "Corruption"


def by_severity(index: Index) -> list[Panel]:
    """Accuracy and ECE against severity, with intervals: of few corruptions openly, of many behind their groups."""
    out, parts = [], portions(index)
    for name in dict.fromkeys(name for name, _ in index.corrupted):
        drawn = [c for where, c in index.corrupted if where == name and len(index.severities(name, c)) > 1]
        many = len(drawn) > FEW_CORRUPTIONS
        for cohort in parts:
            made = [
                _severity_figure(index, cohort, name, corruption, index.severities(name, corruption), metric)
                for corruption in drawn
                for metric in ("top1", "ece")
            ]
            figures = [figure for figure in made if figure is not None]
            title = f"Each corruption on {name}" if many else f"{units.corruption(drawn[0])} on {name}" if drawn else ""
            title = title if many or len(drawn) < 2 else f"Corruptions of {name}"
            open_ones = 0 if many else MOST_CURVES
            out += panel(
                titled(cohort, title, len(index.cohorts) > 1), figures, legend_of(cohort), open_ones, most=MOST_CURVES
            )
    return out


def by_group(index: Index) -> list[Panel]:
    """Curves of groups of corruptions, and how far each group's mean is from the reference's, with its interval."""
    out, parts = [], portions(index)
    for name in dict.fromkeys(name for name, _ in index.corrupted):
        groups = [c for where, c in index.corrupted if where == name and c in GROUPS]
        for cohort in parts if groups else []:
            figures = [_group_curve(index, cohort, name, group) for group in groups]
            differences = _group_differences(index, cohort, name, groups)
            shown = [figure for figure in (differences, *figures) if figure is not None]
            title = titled(cohort, f"Groups of corruptions on {name}", len(index.cohorts) > 1)
            out += panel(title, shown, legend_of(cohort))
    return out


def _group_differences(index: Index, cohort: Cohort, name: str, groups: list[str]) -> Figure | None:
    rows = {
        (m, g): row
        for m in cohort.variants
        for g in groups
        if (row := index.row(m, "mean_top1", set=name, corruption=g, reference=cohort.reference)) is not None
        and row["value"] is not None
    }
    if not rows or not cohort.reference:
        return None
    measure = units.metric("mean_top1")
    bounds = [row[column] for row in rows.values() for column in ("value", "low", "high")]
    axes = svg.Axes(
        f"Difference of mean top-1 by group, {name}",
        f"Paired differences to {cohort.reference} with 95 % intervals.",
        (-0.5, len(groups) - 0.5),
        svg.padded([*bounds, 0.0]),
        y_label="difference (points)",
        x_ticks=range(len(groups)),
        x_text=lambda k: units.corruption(groups[int(k)]),
        y_text=hundred,
    )
    axes.guide((-0.5, 0), (len(groups) - 0.5, 0))
    count = len(cohort.variants)
    for place, (model, series) in enumerate([each for each in series_of(cohort) if each[0] != cohort.reference]):
        aside = (place - (count - 1) / 2) * min(0.11, 0.75 / max(count, 1))
        for k, group in enumerate(groups):
            if (row := rows.get((model, group))) is not None:
                axes.whisker(k + aside, row["low"], row["high"], series)
                shown = f"{measure.difference(row['value'])} {measure.difference_interval(row['low'], row['high'])}"
                axes.mark(k + aside, row["value"], series, f"{model}, {units.corruption(group)}: {shown}")
    data = csv(("model", "group", *BOUNDS), [(*at, *(row[c] for c in BOUNDS)) for at, row in rows.items()])
    caption = f"Mean top-1 over severities and members, minus that of {cohort.reference}; 95 % intervals."
    return Figure("Difference by group", axes.render(), caption, data)


def _group_curve(index: Index, cohort: Cohort, name: str, group: str) -> Figure | None:
    """Mean top-1 of a group's members at each severity."""
    within = [c for c in members(group) if (name, c) in index.corrupted]
    severities = sorted(set.intersection(*(set(index.severities(name, c)) for c in within))) if within else []
    rows = []
    for model in cohort.models:
        for severity in severities:
            found = [index.value(model, "top1", set=name, corruption=c, severity=severity) for c in within]
            known = [value for value in found if value is not None]
            if len(known) == len(found):
                rows.append((model, severity, sum(known) / len(known)))
    if len(severities) < 2 or not rows:
        return None
    called = units.corruption(group)
    listed = units.words([units.small(units.corruption(c)) for c in within])
    axes = svg.Axes(
        f"Mean top-1 under {called}, {name}",
        f"Mean over {listed} at each severity.",
        (severities[0] - 0.3, severities[-1] + 0.3),
        svg.padded([value for *_, value in rows], floor=0, ceiling=1),
        x_label="severity (0 = without corruption)" if severities[0] == 0 else "severity",
        y_label="Top-1 accuracy (%)",
        x_ticks=severities,
        y_text=hundred,
    )
    for model, series in series_of(cohort):
        points = [(severity, value) for of, severity, value in rows if of == model]
        axes.line(points, series)
        for severity, value in points:
            axes.mark(severity, value, series, f"{model}, severity {severity}: {units.percent(value)}")
    data = csv(("model", "severity", "top1"), rows)
    return Figure(called, axes.render(), f"Mean over {listed}; intervals stand at the differences.", data)


def _severity_figure(
    index: Index, cohort: Cohort, name: str, corruption: str, severities: list[int], metric: str
) -> Figure | None:
    rows = {
        (m, s): index.row(m, metric, set=name, corruption=corruption, severity=s)
        for m in cohort.models
        for s in severities
    }
    known = {at: row for at, row in rows.items() if row is not None and row["value"] is not None}
    if not known:
        return None
    measure = units.metric(metric)
    bounds = [row[column] for row in known.values() for column in ("value", "low", "high")]
    axes = svg.Axes(
        f"{measure.name} under {units.corruption(corruption)}, {name}",
        f"{measure.name} of {units.words(list(cohort.models))} at severities {severities[0]} to "
        f"{severities[-1]}; bars are 95 % intervals.",
        (severities[0] - 0.3, severities[-1] + 0.3),
        svg.padded(bounds, floor=0, ceiling=1),
        x_label="severity (0 = without corruption)" if severities[0] == 0 else "severity",
        y_label=f"{measure.name} (%)",
        x_ticks=severities,
        y_text=hundred,
    )
    count = len(cohort.models)
    for place, (model, series) in enumerate(series_of(cohort)):
        aside = (place - (count - 1) / 2) * min(0.09, 0.5 / max(count, 1))  # side by side, so that intervals are seen
        points = [(s + aside, known[model, s]) for s in severities if (model, s) in known]
        axes.line([(x, row["value"]) for x, row in points], series)
        for x, row in points:
            axes.whisker(x, row["low"], row["high"], series)
            shown = f"{measure.value(row['value'])} {measure.interval(row['low'], row['high'])}"
            axes.mark(x, row["value"], series, f"{model}, severity {round(x)}: {shown}")
    n = index.n(name, corruption)
    better = "higher is better" if measure.better > 0 else "lower is better"
    data = csv(("model", "severity", *BOUNDS), [(*at, *(row[c] for c in BOUNDS)) for at, row in known.items()])
    title = f"{units.corruption(corruption)}: {measure.name}"
    return Figure(title, axes.render(), f"95 % intervals{f', n = {units.count(n)}' if n else ''}; {better}.", data)


def corrupted(index: Index) -> list[Table]:
    """A table per corruption and set: top-1 and ECE at each severity, and their means."""
    out = []
    for name, corruption in index.corrupted:
        here = {"set": name, "corruption": corruption}
        columns: list[tuple[str, int]] = [
            (metric, severity) for metric in ("top1", "ece") for severity in index.severities(name, corruption)
        ]
        columns += [(metric, 0) for metric in ("mean_top1", "mean_ece")]
        columns = [(m, s) for m, s in columns if any(index.row(model, m, severity=s, **here) for model in index.models)]
        rows = []
        for model in index.models:
            found = [index.row(model, m, severity=s, **here) for m, s in columns]
            if any(found):
                cells = [value_cell(units.metric(m), row) for (m, _), row in zip(columns, found, strict=True)]
                rows.append([Cell(model), *cells])
        head = [Cell("Model")] + [
            Cell(_short(m), "mean, 1 and above" if m.startswith("mean_") else f"severity {s}") for m, s in columns
        ]
        n = index.n(name, corruption)
        out.append(Table(f"{units.corruption(corruption)} on {name}", head, rows, images_note(n)))
    return out


def ratios(index: Index) -> list[Table]:
    """A model's mean error over that of its reference, by corruption and group, with the median over corruptions and
    how many are worse."""
    out = []
    for name in dict.fromkeys(name for name, _ in index.corrupted):
        columns = [
            Column("error_ratio", {"set": name, "corruption": c}, Cell(units.corruption(c)), True, c not in MANY)
            for where, c in index.corrupted
            if where == name
        ]
        out += by_model(index, f"Error over the reference's, {name}", columns, unchanged=1)
    return out


def _short(metric: str) -> str:
    return "Top-1" if metric.endswith("top1") else "ECE"
