"""Figures and tables of labelled sets: reliability diagrams, and every metric with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qclip.results import Curve

from . import svg, units
from .index import WHOLE, Cohort, Index
from .parts import (
    HALVES,
    MOST,
    Cell,
    Figure,
    Panel,
    Table,
    csv,
    hundred,
    images_note,
    legend_of,
    metric_heading,
    panel,
    portions,
    series_of,
    titled,
    value_cell,
)
from .tabulated import Column, by_model
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
DETAIL = (
    "ece_proxy",
    "ece_adaptive",
    "ece_max",
    "ece_l2",
    "ece_classwise",
    "ece_classwise_likely",
    "overconfidence",
    "underconfidence",
    "nll_ts",
    "nll_proxy",
    "brier_top",
    "brier_rel",
    "brier_res",
    "brier_unc",
    "temperature_proxy",
)
GROUPED = ("worst_group_top1", "group_gap")
BINS = 15
Bin = tuple[int, float, float, float]  # number, images, accuracy, mean confidence
MANY, FIRST = 10, 5  # of more diagrams than MANY the first are shown openly


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


def details(index: Index, sets: Sequence[str]) -> list[Table]:
    """Other ways to measure calibration, and what the Brier score is made of: a table per set."""
    columns = {name: [Column(metric, {"set": name}) for metric in DETAIL] for name in sets}
    return [t for name in sets for t in by_model(index, f"Calibration in detail, {name}", columns[name])]


def trajectory(index: Index, sets: Sequence[str]) -> list[Panel]:
    """Where quantization moves a model between confidence and accuracy: an arrow from the reference to each variant."""
    out, parts = [], portions(index)
    for cohort in parts:
        made = [_moved(index, cohort, name) for name in sets] if cohort.reference else []
        figures = [figure for figure in made if figure is not None]
        out += panel(titled(cohort, "From float to quantized", len(index.cohorts) > 1), figures, legend_of(cohort))
    return out


def _moved(index: Index, cohort: Cohort, name: str) -> Figure | None:
    rows = []
    for model in cohort.models:
        x, y = index.value(model, "mean_confidence", set=name), index.row(model, "top1", set=name)
        if x is not None and y is not None and svg.finite(y["value"]):
            rows.append((model, x, y["value"], y["low"], y["high"]))
    places = {model: (x, y) for model, x, y, _, _ in rows}
    if len(places) < 2 or cohort.reference not in places:
        return None
    bounds = svg.padded([x for x, _ in places.values()] + [end for row in rows for end in row[2:]], 0.1, 0, 1)
    axes = svg.Axes(
        f"Confidence and accuracy on {name}",
        f"From {cohort.reference} to each variant; on the diagonal mean confidence equals accuracy.",
        bounds,
        bounds,
        x_label="mean confidence (%)",
        y_label="top-1 accuracy (%)",
        height=330,
        x_text=hundred,
        y_text=hundred,
    )
    axes.guide((bounds[0], bounds[0]), (bounds[1], bounds[1]))
    series = dict(series_of(cohort))
    for model, x, y, low, high in rows:
        if model != cohort.reference:
            axes.arrow(places[cohort.reference], (x, y), series[model])
        axes.whisker(x, low, high, series[model])
        axes.mark(x, y, series[model], f"{model}: confidence {units.percent(x)}, accuracy {units.percent(y)}")
    caption = (
        "Below the diagonal a model is overconfident, above it underconfident; bars are 95 % intervals of accuracy."
    )
    data = csv(("model", "mean_confidence", "top1", "top1_low", "top1_high"), rows)
    return Figure(name, axes.render(), caption, data)


def diagrams(index: Index, sets: Sequence[str], open_ones: int = MOST) -> list[Panel]:
    """A reliability diagram per model and set: accuracy against confidence in 15 bins, and the images in each."""
    out: list[Panel] = []
    references = {model: cohort.reference for cohort in index.cohorts for model in cohort.variants}
    found = {(c["set"], c["model"]): bins for c in index.curves("reliability") if (bins := _bins(c))}
    for name in sets:
        figures = [
            _diagram(index, m, name, found[name, m], found.get((name, references.get(m, "")), []))
            for m in index.models
            if (name, m) in found
        ]
        out += panel(name, figures, open_ones=open_ones if len(figures) <= MANY else min(open_ones, FIRST), small=True)
    return out


def _bins(curve: Curve) -> list[Bin]:
    """(bin, images, accuracy, mean confidence) of every bin that holds an image."""
    columns = [curve["points"][name] for name in ("bin", "count", "accuracy", "confidence")]
    return [row for row in zip(*columns, strict=True) if svg.finite(*row) and row[1]]


def _diagram(index: Index, model: str, name: str, bins: list[Bin], before: list[Bin]) -> Figure:
    """before: the bins of the model's reference; a dot marks where each of them was."""
    ece, gap = index.row(model, "ece", set=name), index.row(model, "signed_gap", set=name)
    total, most = sum(b[1] for b in bins), max((b[1] for b in bins), default=1)
    measure = units.metric("ece")
    said = [f"ECE {measure.value(ece['value'])} {measure.interval(ece['low'], ece['high'])}".strip()] if ece else []
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
    now = {b: (confidence, accuracy) for b, _, accuracy, confidence in bins}
    for b, _, accuracy, confidence in before:
        if b in now:
            axes.arrow((confidence, accuracy), now[b], 0, head=False)
        axes.mark(confidence, accuracy, 0, f"the reference: accuracy {units.percent(accuracy)}", size=2)
    axes.guide((0, 0), (1, 1))
    middle = (axes.left + axes.right) / 2
    axes.draw(
        svg.element("line", x1=axes.left, x2=axes.right, y1=strip, y2=strip, class_="axis"),
        svg.text(middle, axes.bottom + 33, "confidence (%)", "label", "middle"),
        svg.text(middle, strip + 16, f"images in each bin (most {units.count(most)})", "label", "middle"),
    )
    rows = [("this", *each) for each in bins] + [("reference", *each) for each in before]
    data = csv(("model", "bin", "images", "accuracy", "confidence"), rows)
    return Figure(model, axes.render(), units.title("; ".join(said)) + ".", data)


def chance_ece(bins: list[tuple[float, float]]) -> float:
    """The ECE to expect of a perfectly calibrated model from (images, accuracy) bins: the half-normal mean of each
    bin's binomial error (docs/methods.md, Accuracy and calibration)."""
    total = sum(images for images, _ in bins)
    if not total:
        return 0.0
    return sum(n / total * math.sqrt(2 * a * (1 - a) / (math.pi * n)) for n, a in bins)
