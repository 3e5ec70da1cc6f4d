"""Bars: what is computed how, how large the models are, how long an image takes."""

from __future__ import annotations

from collections.abc import Callable

from markupsafe import Markup

from . import svg, units
from .figures import Figure, Panel, panel
from .index import Index

STATES = ("real", "simulated", "float")


def coverage(index: Index) -> list[Panel]:
    """Stacked shares of MACs and parameters, a bar for each model."""
    figures = []
    for metric, name in (("coverage_macs", "Multiply-accumulates"), ("coverage_params", "Parameters")):
        found = [m for m in index.models if any(index.value(m, metric, subset=s) is not None for s in STATES)]
        if found:
            figures.append(_stacked(index, metric, name, found))
    legend = [(_swatch(state), state) for state in STATES]
    return panel("Shares", figures, legend)


def _swatch(state: str) -> Markup:
    return svg.element("svg", svg.rect(5, 1, 20, 12, state, radius=2), viewBox="0 0 30 14", class_="key", aria_hidden="true")


def _stacked(index: Index, metric: str, name: str, found: list[str]) -> Figure:
    width, row = 360.0, 42.0
    body, told = [], []
    for k, model in enumerate(found):
        top, left = k * row + 4, 0.0
        shares = {state: index.value(model, metric, subset=state) or 0.0 for state in STATES}
        said = ", ".join(f"{state} {units.percent(share)}" for state, share in shares.items() if share)
        told.append(f"{model}: {said}")
        body.append(svg.text(0, top + 11, shorten(model, 30), "name"))
        for state, share in shares.items():
            span = share * width
            if span > 0:
                body.append(svg.rect(left, top + 17, max(span - 1, 0.8), 17, state, f"{model}: {state} {units.percent(share)}"))
                if span > 44:
                    body.append(svg.text(left + 6, top + 29.5, units.percent(share), f"on {state}"))
            left += span
    return Figure(name, svg.document(width, len(found) * row + 2, f"{name} by how they are computed", "; ".join(told), body))


def bars(title: str, rows: list[tuple[str, float, str]], caption: str = "") -> Figure:
    """Horizontal bars from (model, number, printed number)."""
    width, row = 360.0, 40.0
    most = max((number for _, number, _ in rows), default=0) or 1
    body = []
    for k, (model, number, shown) in enumerate(rows):
        top = k * row + 4
        body += [svg.text(0, top + 11, shorten(model, 26), "name"), svg.text(width, top + 11, shown, "name", "end"),
                 svg.rect(0, top + 17, width, 9, "rail", radius=2),
                 svg.rect(0, top + 17, max(width * number / most, 1.5), 9, "amount", f"{model}: {shown}", radius=2)]  # fmt: skip
    told = "; ".join(f"{model}: {shown}" for model, _, shown in rows)
    return Figure(title, svg.document(width, len(rows) * row, title, told, body), caption)


def size_and_speed(index: Index) -> list[Panel]:
    """Bars of model bytes, artifact bytes and milliseconds an image."""
    figures = []
    kinds: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
        ("model_bytes", "Size in memory", units.size),
        ("artifact_bytes", "Size of the artifact", units.size),
        ("ms_per_image", "Time for one image", units.milliseconds),
    )
    for metric, name, shown in kinds:
        for where in dict.fromkeys(row["set"] for row in index.rows(metric)):
            rows = []
            for row in index.rows(metric):
                if row["set"] != where or row["value"] is None:
                    continue
                speed = metric == "ms_per_image"
                told = shown(row["value"]) + (ratio_said(index, row) if not (speed and index.simulated(row["model"])) else
                                              " (simulated)")  # fmt: skip
                rows.append((row["model"], row["value"], told))
            if rows:
                figures.append(bars(f"{name}, {where}" if where else name, rows))
    return panel("", figures)


def ratio_said(index: Index, row: dict) -> str:
    """ " · 0.26x of float" against the row's reference model."""
    for family in index.families:
        if row["model"] in family.variants and family.reference:
            base = index.row(family.reference, row["metric"], set=row["set"], subset=row["subset"], score=row["score"])
            if base is not None and base["value"]:
                return f" \N{MIDDLE DOT} {row['value'] / base['value']:.2f}\N{MULTIPLICATION SIGN}"
    return ""


def shorten(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


