"""What a section is made of: figures in panels, and tables."""

from __future__ import annotations

import csv as _csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from . import svg, units
from .index import Cohort, Index

MODELS = 7  # variants in one figure: as many as there are distinct series beside the reference
MOST = 24  # figures of one kind; the rest is in the JSON
WIDTH = 360.0  # of drawings without axes


@dataclasses.dataclass(frozen=True)
class Figure:
    title: str
    svg: Markup
    caption: str = ""
    data: str = ""  # what is drawn, as CSV


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
        if len(self.figures) == 1 and not self.folded:
            return "one"
        return "small" if self.small else "two" if len(self.figures) in (2, 4) else ""


@dataclasses.dataclass(frozen=True)
class Cell:
    text: str
    small: str = ""  # below the text: an interval, or a unit in a heading


@dataclasses.dataclass(frozen=True)
class Table:
    """Its first column names what the row is about."""

    title: str
    head: list[Cell]
    rows: list[list[Cell]]
    note: str = ""


def panel(
    title: str,
    figures: list[Figure],
    legend: list[tuple[Markup, str]] | None = None,
    open_ones: int = MOST,
    small: bool = False,
    most: int = MOST,
) -> list[Panel]:
    """One panel, or none without figures. At most `open_ones` are shown openly and `most` in all."""
    if not figures:
        return []
    rest = len(figures) - most
    left_out = f"{rest} further figures of this kind are left out; their numbers are in the JSON." if rest > 0 else ""
    return [Panel(title, figures[:open_ones], legend or [], figures[open_ones:most], left_out, small)]


def csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The numbers behind a figure; undefined ones are empty."""
    out = io.StringIO()
    writer = _csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow([f"{each:.6g}" if isinstance(each, float) else each for each in row])
    return out.getvalue()


def listed(what: str, numbers: list[str], most: int = 5) -> str:
    """A caption of a number for each model; of many the table below is easier to read."""
    if len(numbers) > most:
        return f"{what} with its intervals: all numbers, below."
    return f"{what}: {', '.join(numbers)}." if numbers else ""


def legend_of(cohort: Cohort) -> list[tuple[Markup, str]]:
    return [(svg.key(series), cohort.short(model)) for model, series in series_of(cohort)]


def series_of(cohort: Cohort) -> list[tuple[str, int]]:
    """(model, series) pairs; series 0 is the reference's own look."""
    first = 0 if cohort.reference else 1
    return [(model, first + k) for k, model in enumerate(cohort.models)]


def portions(index: Index) -> list[Cohort]:
    """Cohorts small enough for one figure."""
    return [part for cohort in index.cohorts for part in cohort.chunks(MODELS)]


def titled(cohort: Cohort, what: str, several: bool) -> str:
    """A panel's title, with the cohort's name where there are several."""
    return f"{cohort.label} \N{MIDDLE DOT} {what}" if several and cohort.label else what


def value_cell(measure: units.Measure, row: Mapping[str, Any] | None) -> Cell:
    """A value with its interval; an en dash where there is none."""
    if row is None:
        return Cell(units.ABSENT)
    return Cell(measure.value(row["value"]), measure.interval(row["low"], row["high"]))


def metric_heading(name: str) -> Cell:
    measure = units.metric(name)
    hint = {1: "higher is better", -1: "lower is better", 0: ""}[measure.better]
    return Cell(measure.name, "points, + is overconfident" if name == "signed_gap" else hint)


def images_note(n: int | None) -> str:
    return f"n = {units.count(n)}" if n else ""


BOUNDS = ("value", "low", "high")
FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
HALVES = (0.0, 0.5, 1.0)


def hundred(share: float) -> str:
    """A share as a tick of an axis in percent."""
    return f"{100 * share:.6g}".replace("-", units.MINUS)


def shorten(name: str, most: int) -> str:
    return name if len(name) <= most else name[: max(most, 2) - 1] + "\N{HORIZONTAL ELLIPSIS}"
