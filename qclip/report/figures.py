"""The figures of the page, each drawn from rows. A figure without rows is not made."""

from __future__ import annotations

import dataclasses
import math

from markupsafe import Markup

from qclip.results import Curve

from . import svg, units
from .index import Family, Index
from .verdicts import SCORE, confidence_said

MODELS = 7  # variants in one figure: as many as there are distinct series beside the reference
MOST = 24  # figures of one kind; the rest is in the JSON
BINS = 15


@dataclasses.dataclass(frozen=True)
class Figure:
    title: str
    svg: Markup
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Figures that share a legend. `legend` holds (key, model) pairs; `left_out` says what had no room."""

    title: str
    figures: list[Figure]
    legend: list[tuple[Markup, str]] = dataclasses.field(default_factory=list)
    folded: list[Figure] = dataclasses.field(default_factory=list)  # behind "show more"
    left_out: str = ""
    small: bool = False  # small multiples: narrower cells

    @property
    def css(self) -> str:
        return "small" if self.small else "two" if len(self.figures) in (2, 4) else ""


def legend_of(family: Family) -> list[tuple[Markup, str]]:
    return [(svg.key(series), family.short(model)) for model, series in series_of(family)]


def series_of(family: Family) -> list[tuple[str, int]]:
    """(model, series) pairs; series 0 is the reference's own look."""
    first = 0 if family.reference else 1
    return [(model, first + k) for k, model in enumerate(family.models)]


def panel(
    title: str,
    figures: list[Figure],
    legend: list[tuple[Markup, str]] | None = None,
    open_ones: int = MOST,
    small: bool = False,
) -> list[Panel]:
    """One panel, or none without figures. At most `open_ones` are shown openly and `MOST` in all."""
    if not figures:
        return []
    rest = len(figures) - MOST
    left_out = f"{rest} further figures of this kind are left out; their numbers are in the JSON." if rest > 0 else ""
    return [Panel(title, figures[:open_ones], legend or [], figures[open_ones:MOST], left_out, small)]


def portions(index: Index) -> list[Family]:
    """Families small enough for one figure."""
    return [part for family in index.families for part in family.chunks(MODELS)]


def titled(family: Family, what: str, several: bool) -> str:
    """A panel's title, with the family's name where there are several."""
    return f"{family.label} \N{MIDDLE DOT} {what}" if several and family.label else what


def reliability(index: Index) -> list[Panel]:
    """One diagram a model and set: accuracy against confidence in 15 bins, and how many images are in each."""
    out: list[Panel] = []
    found = {(c["set"], c["model"]): bins for c in index.curves("reliability") if (bins := _bins(c))}
    for name in sorted(dict.fromkeys(name for name, _ in found), key=lambda s: s not in index.id_sets):
        figures = [_diagram(index, m, name, found[name, m]) for m in index.models if (name, m) in found]
        out += panel(name, figures, open_ones=MOST if name in index.id_sets else 0, small=True)
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
        x_ticks=_HALVES,
        y_ticks=_HALVES,
        x_text=_hundred,
        y_text=_hundred,
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
    """The ECE to expect of a perfectly calibrated model from (images, accuracy) bins: methods 3.1, half-normal mean of
    each bin's binomial error."""
    total = sum(images for images, _ in bins)
    if not total:
        return 0.0
    return sum(n / total * math.sqrt(2 * a * (1 - a) / (math.pi * n)) for n, a in bins)


def roc(index: Index) -> list[Panel]:
    """One ROC curve panel a family: a figure for each OOD set, by the score that is judged."""
    curves: dict[tuple[str, str, str], list[svg.Point]] = {}
    for curve in index.curves("roc"):
        pairs = zip(curve["points"]["fpr"], curve["points"]["tpr"], strict=True)
        curves[curve["model"], curve["set"], curve["score"]] = [pair for pair in pairs if svg.finite(*pair)]
    scores = list(dict.fromkeys(score for _, _, score in curves))
    if not curves:
        return []
    score = SCORE if SCORE in scores else scores[0]
    kinds = dict(index.ood_sets)
    sets = [s for s, _ in index.ood_sets]
    sets += [s for s in dict.fromkeys(s for _, s, _ in curves) if s not in sets]
    out, parts = [], portions(index)
    for family in parts:
        figures = []
        for name in sets:
            lines = {m: sorted(curves[m, name, score]) for m in family.models if (m, name, score) in curves}
            if lines:
                figures.append(_roc_figure(index, family, name, kinds.get(name, ""), score, lines))
        out += panel(titled(family, f"By {units.SCORES.get(score, score)}", len(parts) > 1), figures, legend_of(family))
    return out


def _roc_figure(
    index: Index, family: Family, name: str, kind: str, score: str, lines: dict[str, list[svg.Point]]
) -> Figure:
    shown = f"{name} ({kind} OOD)" if kind and kind not in name.lower() else name
    areas = [
        f"{family.short(m)} {100 * v:.1f}"
        for m in lines
        if (v := index.value(m, "auroc", set=name, score=score)) is not None
    ]
    caption = f"AUROC in percent: {', '.join(areas)}." if areas else ""
    axes = svg.Axes(
        f"ROC of OOD detection on {shown}",
        f"Share of ID images accepted against share of OOD images accepted. {caption}",
        (0, 1),
        (0, 1),
        x_label="OOD images accepted (%)",
        y_label="ID images accepted (%)",
        width=340,
        height=300,
        x_ticks=_FIFTHS,
        y_ticks=_FIFTHS,
        x_text=_hundred,
        y_text=_hundred,
    )
    axes.guide((0, 0), (1, 1))
    for model, series in series_of(family):
        if model in lines:
            axes.line([*lines[model], *([(1.0, 1.0)] if lines[model][-1][0] < 1 else [])], series)
    return Figure(shown, axes.render(), caption)


def noise(index: Index) -> list[Panel]:
    """Accuracy and ECE against severity, with intervals."""
    out, parts = [], portions(index)
    for name, corruption in index.corrupted:
        severities = index.severities(name, corruption)
        if len(severities) < 2:
            continue
        for family in parts:
            made = [_severity_figure(index, family, name, corruption, severities, m) for m in ("top1", "ece")]
            figures = [figure for figure in made if figure is not None]
            title = f"{units.title(corruption)} on {name}"
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
        f"{measure.name} under {units.title(corruption).lower()}, {name}",
        f"{measure.name} of {units.words(list(family.models))} at severities {severities[0]} to "
        f"{severities[-1]}; bars are 95 % intervals.",
        (severities[0] - 0.3, severities[-1] + 0.3),
        svg.padded(bounds, floor=0, ceiling=1),
        x_label="severity (0 = without corruption)" if severities[0] == 0 else "severity",
        y_label=f"{measure.name} (%)",
        x_ticks=severities,
        y_text=_hundred,
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


_FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_HALVES = (0.0, 0.5, 1.0)


def _hundred(share: float) -> str:
    return f"{100 * share:.6g}".replace("-", units.MINUS)
