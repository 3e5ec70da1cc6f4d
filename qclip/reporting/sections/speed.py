"""Size in memory and on disk, and the time per image."""

from __future__ import annotations

from collections.abc import Callable

from .. import svg, units
from ..index import Cohort, Index
from ..overview import MISSING, Axis, Mark
from ..parts import WIDTH, Figure, Panel, csv, panel, shorten
from ..verdicts import Answers, Verdict
from . import Section


class SpeedSection(Section):
    name = "speed"
    title = "Speed and size"
    intro = (
        "Ratios are to the reference. Times are taken in passing, while images were embedded; `qclip bench` measures "
        "speed. Models with simulated layers have no ratio of time."
    )
    absent = "Neither size nor time was recorded."

    def overview(self, index: Index, cohort: Cohort, answers: Answers) -> list[Axis]:
        sizes = {model: _size(index, cohort, model) for model in cohort.variants}
        times = {model: _time(index, cohort, model) for model in cohort.variants}
        return [Axis("Size", "Bytes in memory", sizes), Axis("Speed", "Timed in passing, without an interval", times)]

    def panels(self, index: Index) -> list[Panel]:
        return size_and_speed(index)


def _size(index: Index, cohort: Cohort, model: str) -> Mark:
    """Exact, so that any difference is one."""
    ours, theirs = (index.value(each, "model_bytes") for each in (model, cohort.reference))
    if ours is None or not theirs:
        return MISSING
    verdict = Verdict.SAME if ours == theirs else Verdict.BETTER if ours < theirs else Verdict.WORSE
    ratio = f"{ours / theirs:.2f}{units.TIMES}"
    return Mark(verdict, ratio, f"{units.size(ours)}, {ratio} the reference's", abs(1 - ours / theirs))


def _time(index: Index, cohort: Cohort, model: str) -> Mark:
    """A time without an interval decides nothing, and a simulated model's time says nothing."""
    for where in dict.fromkeys(row["set"] for row in index.rows("ms_per_image")):
        ours, theirs = (index.value(each, "ms_per_image", set=where) for each in (model, cohort.reference))
        if ours and theirs and not index.simulated(model):
            ratio = f"{theirs / ours:.1f}{units.TIMES} as fast"
            return Mark(Verdict.NOTED, ratio, f"{units.milliseconds(ours)} an image, {ratio}, in passing")
    return MISSING


def size_and_speed(index: Index) -> list[Panel]:
    """Bars of model bytes, artifact bytes and milliseconds per image."""
    kinds: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
        ("model_bytes", "Size in memory", units.size),
        ("artifact_bytes", "Size of the artifact", units.size),
        ("ms_per_image", "Time for one image", units.milliseconds),
    )
    figures = []
    for metric, name, shown in kinds:
        for where in dict.fromkeys(row["set"] for row in index.rows(metric)):
            rows = [
                (row["model"], row["value"], shown(row["value"]) + _ratio(index, row))
                for row in index.rows(metric)
                if row["set"] == where and svg.finite(row["value"])
            ]
            if rows:
                figures.append(bars(f"{name}, {where}" if where else name, rows))
    return panel("", figures)


def _ratio(index: Index, row: dict) -> str:
    """What stands behind the number: the ratio to the reference. A simulated model's time has none."""
    time = row["metric"] == "ms_per_image"
    if time and index.simulated(row["model"]):
        return " (simulated)"
    cohort = next((f for f in index.cohorts if f.reference and row["model"] in f.variants), None)
    if cohort is None:
        return ""
    base = index.value(cohort.reference, row["metric"], set=row["set"], subset=row["subset"], score=row["score"])
    if not base or not row["value"]:
        return ""
    times = units.TIMES
    return f" ({base / row['value']:.1f}{times} as fast)" if time else f" ({row['value'] / base:.2f}{times})"


def bars(title: str, rows: list[tuple[str, float, str]]) -> Figure:
    """Horizontal bars from (model, number, printed number)."""
    row, body = 40.0, []
    most = max((number for _, number, _ in rows), default=0.0) or 1.0
    for k, (model, number, shown) in enumerate(rows):
        top, long = k * row + 4, max(WIDTH * number / most, 1.5)
        body += [
            svg.text(0, top + 11, shorten(model, 50 - len(shown)), "name"),
            svg.text(WIDTH, top + 11, shown, "name", "end"),
            svg.rect(0, top + 17, WIDTH, 9, "rail", radius=2),
            svg.rect(0, top + 17, long, 9, "amount", f"{model}: {shown}", radius=2),
        ]
    told = "; ".join(f"{model}: {shown}" for model, _, shown in rows)
    drawing = svg.document(WIDTH, len(rows) * row, title, told, body)
    return Figure(title, drawing, data=csv(("model", "value"), [(model, number) for model, number, _ in rows]))
