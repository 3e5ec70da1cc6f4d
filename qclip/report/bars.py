"""Bars: what is computed how, how large the models are, how long an image takes."""

from __future__ import annotations

from collections.abc import Callable

from markupsafe import Markup

from . import svg, units
from .figures import Figure, Panel, panel
from .index import Index

STATES = ("real", "simulated", "float")
WIDTH = 360.0


def coverage(index: Index) -> list[Panel]:
    """Stacked shares of MACs and parameters, a bar for each model."""
    figures = []
    for metric, name in (("coverage_macs", "Multiply-accumulates"), ("coverage_params", "Parameters")):
        found = [m for m in index.models if any(index.value(m, metric, axis="state", at=s) is not None for s in STATES)]
        if found:
            figures.append(_stacked(index, metric, name, found))
    return panel("", figures, [(_swatch(state), state) for state in STATES])


def _swatch(state: str) -> Markup:
    body = svg.rect(5, 1, 20, 12, state, radius=2)
    return svg.element("svg", body, viewBox="0 0 30 14", class_="key", aria_hidden="true")


def _stacked(index: Index, metric: str, name: str, found: list[str]) -> Figure:
    row, body, told = 42.0, [], []
    for k, model in enumerate(found):
        top, left = k * row + 4, 0.0
        shares = {state: index.value(model, metric, axis="state", at=state) or 0.0 for state in STATES}
        told.append(f"{model}: {units.words([f'{state} {units.percent(v)}' for state, v in shares.items() if v])}")
        body.append(svg.text(0, top + 11, shorten(model, 48), "name"))
        for state, share in shares.items():
            span = share * WIDTH
            if span > 0:
                tip = f"{model}: {state} {units.percent(share)}"
                body.append(svg.rect(left, top + 17, max(span - 1, 0.8), 17, state, tip))
            if span > 44:  # room for the number
                body.append(svg.text(left + 6, top + 29.5, units.percent(share), f"on {state}"))
            left += span
    drawing = svg.document(WIDTH, len(found) * row + 2, f"{name} by how they are computed", "; ".join(told), body)
    return Figure(name, drawing)


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
    return Figure(title, svg.document(WIDTH, len(rows) * row, title, told, body))


def size_and_speed(index: Index) -> list[Panel]:
    """Bars of model bytes, artifact bytes and milliseconds an image."""
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
    family = next((f for f in index.families if f.reference and row["model"] in f.variants), None)
    if family is None:
        return ""
    base = index.value(family.reference, row["metric"], set=row["set"], subset=row["subset"], score=row["score"])
    if not base or not row["value"]:
        return ""
    times = units.TIMES
    return f" ({base / row['value']:.1f}{times} as fast)" if time else f" ({row['value'] / base:.2f}{times})"


def shorten(name: str, most: int) -> str:
    return name if len(name) <= most else name[: max(most, 2) - 1] + "\N{HORIZONTAL ELLIPSIS}"
