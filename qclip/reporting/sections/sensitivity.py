"""Sensitivity: what quantizing each site alone does to the embeddings, along each tower."""

from __future__ import annotations

from typing import Any

from .. import svg, units
from ..index import Index
from ..parts import WIDTH, Cell, Figure, Panel, Table, csv, panel, value_cell
from . import Section

WIDTHS = svg.SERIES - 1  # lines in one figure


class SensitivitySection(Section):
    name = "sensitivity"
    title = "Sensitivity of sites"
    intro = (
        "One site, or the sites that share an input, is quantized at a time; everything else stays float. The error is "
        "1 - mean cosine of the tower's embeddings to the float ones. Sites stand in the order in which they run."
    )
    absent = "No site was quantized alone (`qclip sensitivity`)."

    def panels(self, index: Index) -> list[Panel]:
        rows = _rows(index, "site")
        towers = dict.fromkeys(row["set"].split(".", 1)[0] for row in rows)
        widths = sorted({row["at"] for row in rows})[:WIDTHS]
        figures = [_figure(tower, rows, widths) for tower in towers]
        return panel("Error by site", figures, [(svg.key(k + 1), f"{at} bits") for k, at in enumerate(widths)])

    def tables(self, index: Index) -> list[Table]:
        out = []
        for role in ("tower", "site"):
            rows = _rows(index, role)
            widths = sorted({row["at"] for row in rows})
            names = dict.fromkeys(row["set"] for row in rows)
            by_key = {(row["set"], row["at"]): row for row in rows}
            if not names:
                continue
            measure = units.metric("sensitivity")
            lines = [[Cell(name), *(value_cell(measure, by_key.get((name, at))) for at in widths)] for name in names]
            title = "Each tower alone" if role == "tower" else "Each site alone"
            out.append(Table(title, [Cell(role), *(Cell(f"{at} bits") for at in widths)], lines))
        return out


def _rows(index: Index, role: str) -> list[dict[str, Any]]:
    return [row for row in index.rows("sensitivity") if row["role"] == role and row["value"] is not None]


def _figure(tower: str, rows: list[dict[str, Any]], widths: list[int]) -> Figure:
    """Of sites that share an input the first one stands for all."""
    mine = {row["subset"]: row["set"] for row in reversed(rows) if row["set"].split(".", 1)[0] == tower}
    order = [name for name in dict.fromkeys(row["set"] for row in rows) if name in mine.values()]
    found = {(row["set"], row["at"]): max(row["value"], 1e-9) for row in rows}
    values = [found[name, at] for name in order for at in widths if (name, at) in found]
    title = f"{tower} tower"
    axes = svg.Axes(
        title,
        f"Error of the embeddings for each of {len(order)} sites, at {units.words([f'{at} bits' for at in widths])}.",
        (-0.5, len(order) - 0.5),
        (min(values) / 2, max(values) * 2),
        log_y=True,
        x_label="site, in the order of the tower",
        y_label="1 - cosine",
        x_ticks=range(0, len(order), max(1, len(order) // 6)),
        x_text=lambda k: str(int(k)),
        left=60,
        width=WIDTH,
    )
    for series, at in enumerate(widths, 1):
        points = [(float(k), found[name, at]) for k, name in enumerate(order) if (name, at) in found]
        axes.line(points, series)
        for x, y in points:
            axes.mark(x, y, series, f"{order[int(x)]}, {at} bits: {y:.3g}")
    table = [(k, name, at, found[name, at]) for k, name in enumerate(order) for at in widths if (name, at) in found]
    return Figure(title, axes.render(), data=csv(("site", "name", "bits", "error"), table))
