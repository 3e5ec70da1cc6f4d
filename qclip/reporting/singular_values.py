"""Singular values of weights, drawn."""

from __future__ import annotations

from . import svg, units
from .index import Cohort, Index
from .parts import Figure, Panel, csv, legend_of, panel, portions, series_of, titled

SHOWN = 3  # weights drawn openly; the others are folded away


def singular_values(index: Index) -> list[Panel]:
    """Singular values by rank, log scale, a figure for each weight."""
    values: dict[tuple[str, str], list[svg.Point]] = {}
    for curve in index.curves("singular_values"):
        pairs = zip(curve["points"]["rank"], curve["points"]["value"], strict=True)
        points = [(rank + 1, value) for rank, value in pairs if svg.finite(rank, value) and value > 0]
        if points:
            values[curve["model"], curve["set"]] = points
    out: list[Panel] = []
    parts = portions(index)
    for cohort in parts:
        sites = list(dict.fromkeys(site for model, site in values if model in cohort.models))
        figures = []
        for site in spread(sites):
            lines = {m: sorted(values[m, site]) for m in cohort.models if (m, site) in values}
            figures.append(_singular_figure(cohort, site, lines))
        out += panel(titled(cohort, "Singular values of weights", len(parts) > 1), figures, legend_of(cohort), SHOWN)
    return out


def spread(sites: list[str]) -> list[str]:
    """The first, middle and last first, so that what is drawn openly shows the depth of the model."""
    leading = [sites[k] for k in dict.fromkeys((0, len(sites) // 2, len(sites) - 1))] if sites else []
    return leading + [site for site in sites if site not in leading]


def _singular_figure(cohort: Cohort, site: str, lines: dict[str, list[svg.Point]]) -> Figure:
    points = [point for line in lines.values() for point in line]
    ranks, sizes = [x for x, _ in points], [y for _, y in points]
    axes = svg.Axes(
        f"Singular values of {site}",
        f"By rank, for {units.words(list(lines))}, log scale.",
        (min(ranks), max(ranks)),
        (min(sizes) / 1.2, max(sizes) * 1.2),
        x_label="rank",
        y_label="singular value",
        log_y=True,
    )
    for model, series in series_of(cohort):
        if model in lines:
            axes.line(lines[model], series, "fine")
    rows = [(model, *point) for model, line in lines.items() for point in line]
    return Figure(site, axes.render(), data=csv(("model", "rank", "singular value"), rows))
