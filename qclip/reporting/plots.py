"""Figures that several sections draw: values at named places with intervals, and lines, a series per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import svg, units
from .index import Cohort
from .parts import BOUNDS, WIDTH, Figure, csv, series_of

Marks = dict[str, dict[float, dict]]  # model -> place on the axis -> row


def along(
    cohort: Cohort,
    marks: Marks,
    title: str,
    label: str,
    places: dict[float, str],
    x_label: str,
    scale: float = 1.0,
    rule: float | None = None,
    width: float = WIDTH,
) -> list[Figure]:
    """Values with intervals at named places, models side by side."""
    drawn = [(model, series) for model, series in series_of(cohort) if model in marks]
    starts = sorted(places)
    if not drawn or not starts:
        return []
    found = [row for model, _ in drawn for row in marks[model].values()]
    bounds = [scale * row[end] for row in found for end in ("value", "low", "high") if svg.finite(row[end])]
    axes = svg.Axes(
        title,
        f"For {units.words([model for model, _ in drawn])}, with 95 % intervals.",
        (-0.5, len(starts) - 0.5),
        svg.padded([*bounds, rule], share=0.1),
        x_label=x_label,
        y_label=label,
        x_ticks=range(len(starts)),
        x_text=lambda k: places[starts[int(k)]],
        width=width,
        bottom=44 if x_label else 26,
    )
    if rule is not None:
        axes.guide((-0.5, rule), (len(starts) - 0.5, rule))
    step = min(0.2, 0.8 / len(drawn))
    for place, (model, series) in enumerate(drawn):
        for k, start in enumerate(starts):
            row = marks[model].get(start)
            if row is not None and row["value"] is not None:
                x = k + (place - (len(drawn) - 1) / 2) * step
                if svg.finite(row["low"], row["high"]):
                    axes.whisker(x, scale * row["low"], scale * row["high"], series)
                value = scale * row["value"]
                axes.mark(x, value, series, f"{model}, {places[start]}: {value:.4g}")
    rows = [
        (model, places[start], *(None if (v := row[end]) is None else scale * v for end in BOUNDS))
        for model, _ in drawn
        for start, row in sorted(marks[model].items())
    ]
    return [Figure(title, axes.render(), data=csv(("model", x_label or "at", *BOUNDS), rows))]


def lines(
    cohort: Cohort, curves: Mapping[str, Sequence[svg.Point]], title: str, x_label: str, y_label: str
) -> list[Figure]:
    drawn = [(model, series) for model, series in series_of(cohort) if curves.get(model)]
    if not drawn:
        return []
    points = [point for model, _ in drawn for point in curves[model]]
    axes = svg.Axes(
        title,
        f"For {units.words([model for model, _ in drawn])}.",
        (min(x for x, _ in points), max(x for x, _ in points)),
        svg.padded([y for _, y in points]),
        x_label=x_label,
        y_label=y_label,
    )
    for model, series in drawn:
        axes.line(curves[model], series)
    data = csv(("model", x_label, y_label), [(model, *point) for model, _ in drawn for point in curves[model]])
    return [Figure(title, axes.render(), data=data)]


def points(curve: dict, x: str, y: str, scale: float = 1.0) -> list[svg.Point]:
    columns = curve["points"]
    return [(a, scale * b) for a, b in zip(columns[x], columns[y], strict=True) if svg.finite(a, b)]
