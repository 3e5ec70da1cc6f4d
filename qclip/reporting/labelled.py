"""Figures and tables of labelled sets: reliability diagrams, and every metric with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qclip.results import Curve

from . import svg, units
from .index import WHOLE, Index
from .parts import HALVES, MOST, Cell, Figure, Panel, Table, hundred, images_note, metric_heading, panel, value_cell
from .verdicts import confidence_said

COLUMNS = (
    "top1",
    "top5",
    "balanced_accuracy",
    "ece",
    "ece_ts",
    "signed_gap",
    "nll",
    "brier",
    "mean_confidence",
    "temperature",
)
GROUPED = ("worst_group_top1", "group_gap")
BINS = 15


def tables(index: Index, sets: Sequence[str]) -> list[Table]:
    """A table per set: one row per model, and per model and part where the set has parts."""
    return [table for name in sets if (table := _table(index, name))]


def _table(index: Index, name: str) -> Table | None:
    columns = [
        metric
        for metric in COLUMNS
        if any(row["set"] == name and row["value"] is not None for row in index.rows(metric))
    ]
    grouped = [m for m in GROUPED if any(row["set"] == name for row in index.rows(m))]
    rows = []
    for part in [WHOLE, *index.parts(name)]:
        n = index.n(name, part=part)
        for model in index.models:
            found = [index.row(model, metric, set=name, **part.key) for metric in columns]
            if any(row is not None and row["value"] is not None for row in found):
                cells = [value_cell(units.metric(metric), row) for metric, row in zip(columns, found, strict=True)]
                cells += [
                    value_cell(units.metric(m), index.row(model, m, set=name) if part == WHOLE else None)
                    for m in grouped
                ]
                label = Cell(model, f"{part.name}, n = {units.count(n)}" if part.name else "")
                rows.append([label, *cells])
    if not rows:
        return None
    head = [Cell("Model"), *map(metric_heading, columns), *map(metric_heading, grouped)]
    return Table(name, head, rows, images_note(index.n(name)))


def diagrams(index: Index, sets: Sequence[str], open_ones: int = MOST) -> list[Panel]:
    """A reliability diagram per model and set: accuracy against confidence in 15 bins, and the images in each."""
    out: list[Panel] = []
    found = {(c["set"], c["model"]): bins for c in index.curves("reliability") if (bins := _bins(c))}
    for name in sets:
        figures = [_diagram(index, m, name, found[name, m]) for m in index.models if (name, m) in found]
        out += panel(name, figures, open_ones=open_ones, small=True)
    return out


def _bins(curve: Curve) -> list[tuple[int, float, float, float]]:
    """(bin, images, accuracy, mean confidence) of every bin that holds an image."""
    columns = [curve["points"][name] for name in ("bin", "count", "accuracy", "confidence")]
    return [row for row in zip(*columns, strict=True) if svg.finite(*row) and row[1]]


def _diagram(index: Index, model: str, name: str, bins: list[tuple[int, float, float, float]]) -> Figure:
    ece, gap = index.row(model, "ece", set=name), index.row(model, "signed_gap", set=name)
    total, most = sum(b[1] for b in bins), max((b[1] for b in bins), default=1)
    said = [f"ECE {units.metric('ece').value(ece['value'])}"] if ece else []
    said += [confidence_said(gap["value"], gap["low"], gap["high"])] if gap else []
    floor = chance_ece([(images, accuracy) for _, images, accuracy, _ in bins])
    said.append(f"perfect calibration would show about {units.percent(floor)} by chance")
    told = f"Accuracy against confidence in {BINS} bins, {units.count(total)} images; {'; '.join(said)}."
    axes = svg.Axes(
        f"Reliability of {model} on {name}",
        told,
        (0, 1),
        (0, 1),
        y_label="accuracy (%)",
        width=240,
        height=300,
        x_ticks=HALVES,
        y_ticks=HALVES,
        x_text=hundred,
        y_text=hundred,
        left=44,
        right=14,
        bottom=106,
    )
    strip = axes.height - 20.0  # the foot of the histogram below the diagram
    room = 40.0
    for b, images, accuracy, confidence in bins:
        left, right = b / BINS + 0.004, (b + 1) / BINS - 0.004
        tip = (
            f"confidence {units.percent(confidence)}, accuracy {units.percent(accuracy)}, {units.count(images)} images"
        )
        axes.bar(left, right, 0, accuracy, "hit", tip)
        axes.bar(left, right, accuracy, confidence, "over" if confidence > accuracy else "under", tip)
        x0, x1 = axes.at_x(left), axes.at_x(right)
        tall = room * images / most
        axes.draw(svg.rect(x0, strip - tall, x1 - x0, tall, "count", tip))
    axes.guide((0, 0), (1, 1))
    middle = (axes.left + axes.right) / 2
    axes.draw(
        svg.element("line", x1=axes.left, x2=axes.right, y1=strip, y2=strip, class_="axis"),
        svg.text(middle, axes.bottom + 33, "confidence (%)", "label", "middle"),
        svg.text(middle, strip + 16, f"images in each bin (most {units.count(most)})", "label", "middle"),
    )
    return Figure(model, axes.render(), units.title("; ".join(said)) + ".")


def chance_ece(bins: list[tuple[float, float]]) -> float:
    """The ECE to expect of a perfectly calibrated model from (images, accuracy) bins: the half-normal mean of each
    bin's binomial error (docs/methods.md, Accuracy and calibration)."""
    total = sum(images for images, _ in bins)
    if not total:
        return 0.0
    return sum(n / total * math.sqrt(2 * a * (1 - a) / (math.pi * n)) for n, a in bins)
