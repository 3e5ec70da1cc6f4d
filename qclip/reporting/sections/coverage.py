"""What is computed how, model by model and site by site."""

from __future__ import annotations

from markupsafe import Markup

from .. import svg, units
from ..index import Index
from ..parts import WIDTH, Cell, Figure, Panel, Table, csv, panel, shorten
from ..svg import finite
from . import Section

STATES = ("real", "simulated", "float")
MOST_SITES = 2000  # rows of the site table of one model


class CoverageSection(Section):
    name = "coverage"
    title = "Coverage"
    intro = (
        "Real: integer kernels run it. Simulated: float arithmetic on the quantization grid, good for judging "
        "reliability, never for speed. Float: left as it was."
    )
    absent = "No quantized model told how its layers are computed."
    tables_title = "Site by site"
    tables_printed = False

    def panels(self, index: Index) -> list[Panel]:
        return coverage(index)

    def tables(self, index: Index) -> list[Table]:
        return sites(index)


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
    rows = [(m, s, index.value(m, metric, axis="state", at=s)) for m in found for s in STATES]
    return Figure(name, drawing, data=csv(("model", "computed", "share"), rows))


def sites(index: Index) -> list[Table]:
    """Every site of every quantized model: how it is computed."""
    out = []
    by_model: dict[str, list[dict]] = {}
    for row in index.rows("site_macs"):
        by_model.setdefault(row["model"], []).append(row)
    for model, found in by_model.items():
        total = sum(row["value"] for row in found if finite(row["value"])) or 1
        rows = []
        for row in found[:MOST_SITES]:
            share = row["value"] / total if finite(row["value"]) else None
            texts = [
                row["set"],
                row["at"],
                row["bits"],
                row["backend"],
                units.count(row["value"]),
                units.percent(share, 2),
                units.count(row["n"]),
            ]
            rows.append([Cell(text or units.ABSENT) for text in texts])
        head = [
            Cell("Site"),
            Cell("Computed"),
            Cell("Bits", "weights / activations"),
            Cell("Backend"),
            Cell("MACs"),
            Cell("Share"),
            Cell("Parameters"),
        ]
        rest = len(found) - MOST_SITES
        left_out = f", {rest} left out" if rest > 0 else ""
        out.append(Table(model, head, rows, f"{units.count(len(found))} sites{left_out}"))
    return out
