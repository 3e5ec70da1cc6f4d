"""What noise and other corruptions of growing severity do."""

from __future__ import annotations

from qclip.data.corruptions import CORRUPTIONS, GROUPS, PUBLISHED

from .. import svg, units
from ..index import Family, Index
from ..parts import (
    Cell,
    Figure,
    Panel,
    Table,
    hundred,
    images_note,
    legend_of,
    panel,
    portions,
    series_of,
    titled,
    value_cell,
)
from ..verdicts import Question
from . import Section


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
                f"{called(corruption) if several else 'Noise' if 'noise' in corruption else 'Corruption'} robustness",
                metric,
                name,
                corruption=corruption,
                leading=metric == "mean_top1" and (corruption in GROUPS or name not in grouped),
            )
            for name, corruption in index.corrupted
            for metric in ("mean_top1", "mean_ece")
        ]

    def panels(self, index: Index) -> list[Panel]:
        return by_severity(index)

    def tables(self, index: Index) -> list[Table]:
        return corrupted(index)


def called(corruption: str) -> str:
    """The label of a corruption, or of a group of them."""
    if corruption in GROUPS or corruption == PUBLISHED:
        return GROUPS.get(corruption, "ImageNet-C without frost")
    return CORRUPTIONS.get(corruption).label if corruption in CORRUPTIONS else units.title(corruption)


def by_severity(index: Index) -> list[Panel]:
    """Accuracy and ECE against severity, with intervals."""
    out, parts = [], portions(index)
    for name, corruption in index.corrupted:
        severities = index.severities(name, corruption)
        if len(severities) < 2:
            continue
        for family in parts:
            made = [_severity_figure(index, family, name, corruption, severities, m) for m in ("top1", "ece")]
            figures = [figure for figure in made if figure is not None]
            title = f"{called(corruption)} on {name}"
            out += panel(titled(family, title, len(parts) > 1), figures, legend_of(family))
    return out


def _severity_figure(
    index: Index, family: Family, name: str, corruption: str, severities: list[int], metric: str
) -> Figure | None:
    rows = {
        (m, s): index.row(m, metric, set=name, corruption=corruption, severity=s)
        for m in family.models
        for s in severities
    }
    known = {at: row for at, row in rows.items() if row is not None and row["value"] is not None}
    if not known:
        return None
    measure = units.metric(metric)
    bounds = [row[column] for row in known.values() for column in ("value", "low", "high")]
    axes = svg.Axes(
        f"{measure.name} under {called(corruption)}, {name}",
        f"{measure.name} of {units.words(list(family.models))} at severities {severities[0]} to "
        f"{severities[-1]}; bars are 95 % intervals.",
        (severities[0] - 0.3, severities[-1] + 0.3),
        svg.padded(bounds, floor=0, ceiling=1),
        x_label="severity (0 = without corruption)" if severities[0] == 0 else "severity",
        y_label=f"{measure.name} (%)",
        x_ticks=severities,
        y_text=hundred,
    )
    count = len(family.models)
    for place, (model, series) in enumerate(series_of(family)):
        aside = (place - (count - 1) / 2) * min(0.09, 0.5 / max(count, 1))  # side by side, so that intervals are seen
        points = [(s + aside, known[model, s]) for s in severities if (model, s) in known]
        axes.line([(x, row["value"]) for x, row in points], series)
        for x, row in points:
            axes.whisker(x, row["low"], row["high"], series)
            shown = f"{measure.value(row['value'])} {measure.interval(row['low'], row['high'])}"
            axes.mark(x, row["value"], series, f"{model}, severity {round(x)}: {shown}")
    n = index.n(name, corruption)
    better = "higher is better" if measure.better > 0 else "lower is better"
    return Figure(measure.name, axes.render(), f"95 % intervals{f', n = {units.count(n)}' if n else ''}; {better}.")


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
        out.append(Table(f"{called(corruption)} on {name}", head, rows, images_note(n)))
    return out


def _short(metric: str) -> str:
    return "Top-1" if metric.endswith("top1") else "ECE"
