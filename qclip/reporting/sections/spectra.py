"""Spectra of the weights: what is left of each rank band, beside white noise of equal norm."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from qclip.spectral import judgements, verdict

from .. import svg, units
from ..claims import claims
from ..index import Cohort, Index
from ..parts import BOUNDS, Cell, Figure, Panel, Table, csv, legend_of, panel, portions, series_of, titled, value_cell
from ..singular_values import singular_values, spread
from ..svg import finite
from . import Section

SHOWN = 3  # weights drawn openly; the others are folded away
LEADS = {
    "damped": "High ranks are damped, beyond every control, in",
    "raised": "High ranks are raised, beyond every control, in",
    "shrunk": "Shrunk, and not shown to be filtered, are",
    "grown": "Grown, and no rank band more than the others as far as is shown, are",
    "open": "Nothing is shown that noise of equal norm would not do in",
}
ENDS = {
    "damped": "That is filtering; what it does to reliability is another question.",
    "raised": "That is the opposite of filtering.",
    "shrunk": "A gain below 1 in every band is what a clipped grid does; that is no low-pass filter.",
    "grown": "",
    "open": "",
}
WORDS = {
    "damped": "high ranks damped",
    "raised": "high ranks raised",
    "shrunk": "shrunk",
    "grown": "grown",
    "open": "as noise",
}


class SpectraSection(Section):
    name = "spectra"
    title = "Spectra of the weights"
    intro = (
        "What of each weight's singular directions is left after rounding. A gain of 1 leaves a rank band as it was. "
        "The level is the gain common to all bands: below 1 the weight is shrunk. The shape is the log of the tail's "
        "gain over the head's: only below 0, and below every control, are high ranks filtered. SQNR falls with rank "
        "under any noise, and rounding raises the tail of a weight's own spectrum, so neither shows a filter."
    )
    absent = "Weight spectra were not computed."

    def panels(self, index: Index) -> list[Panel]:
        return beside_controls(index) + gains(index) + singular_values(index)

    def tables(self, index: Index) -> list[Table]:
        return findings(index) + ranks(index)

    def sentences(self, index: Index) -> list[str]:
        """One sentence for each finding, then the numbers of each model and tower."""
        found = judgements(index.results.rows)
        out = []
        for finding, lead in LEADS.items():
            towers: dict[str, list[str]] = {}
            for each in found:
                if each.finding == finding:
                    towers.setdefault(each.model, []).append(each.where.removesuffix(" tower"))
            if towers:
                alike: dict[str, list[str]] = {}  # models of which the same is said
                for model, names in towers.items():
                    alike.setdefault(units.words(names), []).append(model)
                listed = [f"{units.words(models)} ({names})" for names, models in alike.items()]
                out.append(f"{lead} {units.words(listed)}. {ENDS[finding]}".strip())
        return out + verdict(index.results.rows)


def beside_controls(index: Index) -> list[Panel]:
    """Level and shape of each tower, beside what each control would be."""
    parts = portions(index)
    return [
        each
        for cohort in parts
        for each in panel(
            titled(cohort, "Level and shape, beside controls", len(parts) > 1),
            claims(index, cohort, "tower"),
            legend_of(cohort),
        )
    ]


def in_band(start: float, name: str) -> dict[str, Any]:
    """The columns of a row that say its rank band: `at` is its first rank, `subset` its name."""
    return {"axis": "band", "at": start, "subset": name}


def gains(index: Index) -> list[Panel]:
    """What the quantized weight leaves of each rank band of the float one, and its signal to noise ratio, beside white
    noise of equal norm: means over each tower openly, single weights folded away."""
    out: list[Panel] = []
    parts = portions(index)
    for cohort in parts:
        rows = [
            r for r in index.rows("gain") if r["model"] in cohort.models and not r["reference"] and r["role"] != "id"
        ]
        roles = {row["set"]: row["role"] for row in rows}
        towers, single = ([s for s in roles if (roles[s] == "tower") is whole] for whole in (True, False))
        figures = []
        for site in towers:
            figures += [_band_figure(index, cohort, site, metric, True) for metric in ("gain", "sqnr")]
        open_ones = len(figures) or SHOWN
        figures += [_band_figure(index, cohort, site, "gain", False) for site in spread(single)]
        present = {cohort.short(row["model"]) for row in rows}
        legend = [entry for entry in legend_of(cohort) if entry[1] in present]
        legend.append((_white_key(), "white noise of equal norm (control)"))
        out += panel(titled(cohort, "Gain by rank band", len(parts) > 1), figures, legend, open_ones)
    return out


def _white_key() -> Markup:
    body = svg.rect(8, 2.5, 14, 9, "white")
    return svg.element("svg", body, viewBox="0 0 30 14", class_="key", aria_hidden="true")


def _band_figure(index: Index, cohort: Cohort, site: str, metric: str, tower: bool) -> Figure:
    label, rule = ("gain", 1.0) if metric == "gain" else ("SQNR (dB)", None)
    here = {(r["model"], r["at"]): r for r in index.rows(metric) if r["set"] == site and not r["reference"]}
    white = {(r["model"], r["at"]): r for r in index.rows(f"{metric}_white") if r["set"] == site}
    bands = {band: row["subset"] for (model, band), row in here.items() if model in cohort.models}
    starts = sorted(bands)
    drawn = [(m, s) for m, s in series_of(cohort) if any(model == m for model, _ in here)]
    bounds = [
        row[column]
        for found in (here, white)
        for (model, _), row in found.items()
        if model in cohort.models
        for column in ("value", "low", "high")
    ]
    span = [bands[start].removeprefix("ranks ").replace("-", units.RANGE) for start in starts]
    what, where = (f"Mean {label}", f"{site} tower") if tower else (label, site)
    axes = svg.Axes(
        f"{what} of {where} by rank band",
        f"Rank bands {units.words(span)}; grey boxes are white noise of equal norm.",
        (-0.5, len(starts) - 0.5),
        svg.padded([*bounds, rule], share=0.1),
        x_label="ranks",
        y_label=label,
        x_ticks=range(len(starts)),
        x_text=lambda k: span[int(k)],
    )
    if rule is not None:
        axes.guide((-0.5, rule), (len(starts) - 0.5, rule))
    step = min(0.2, 0.8 / max(len(drawn), 1))
    for place, (model, series) in enumerate(drawn):
        for k, start in enumerate(starts):
            x = k + (place - (len(drawn) - 1) / 2) * step
            control, row = white.get((model, start)), here.get((model, start))
            if control is not None:
                _white(axes, x, step, control)
            if row is not None and row["value"] is not None:
                axes.whisker(x, row["low"], row["high"], series)
                axes.mark(x, row["value"], series, f"{model}, ranks {span[k]}: {row['value']:.4g}")
    rows = [
        (of, model, bands[start], *(row[end] for end in BOUNDS))
        for of, found in (("model", here), ("white noise", white))
        for (model, start), row in sorted(found.items())
        if model in cohort.models and start in bands
    ]
    data = csv(("of", "model", "ranks", *BOUNDS), rows)
    return Figure(f"{units.title(where) if tower else where}: {label}", axes.render(), data=data)


def _white(axes: svg.Axes, x: float, step: float, row: dict) -> None:
    """A grey box over the control's interval."""
    if row["value"] is None:
        return
    whole = svg.finite(row["low"], row["high"])
    top = axes.at_y(row["high"] if whole else row["value"])
    bottom = axes.at_y(row["low"] if whole else row["value"])
    half = (axes.at_x(x + step) - axes.at_x(x)) * 0.4
    middle, tall = (top + bottom) / 2, max(bottom - top, 6.0)
    tip = f"white control of {row['model']}: {row['value']:.4g}"
    axes.draw(svg.rect(axes.at_x(x) - half, middle - tall / 2, 2 * half, tall, "white", tip))


def ranks(index: Index) -> list[Table]:
    """Effective and stable rank, and energy by band, as means over each tower."""
    rows = []
    towers = list(dict.fromkeys(row["set"] for row in index.rows("effective_rank") if row["role"] == "tower"))
    bands = {row["at"]: row["subset"] for row in index.rows("band_energy") if row["set"] in towers}
    for tower in towers:
        for model in index.models:
            numbers = [index.value(model, m, set=tower) for m in ("effective_rank", "stable_rank")]
            energies = [index.value(model, "band_energy", set=tower, **in_band(at, bands[at])) for at in bands]
            if finite(*numbers):
                rows.append(
                    [
                        Cell(model, f"{tower} tower"),
                        *(Cell(f"{v:.1f}") for v in numbers),
                        *(Cell(units.percent(v, 2)) for v in energies),
                    ]
                )
    head = [
        Cell("Model"),
        Cell("Effective rank"),
        Cell("Stable rank"),
        *(Cell("Energy", band.replace("-", units.RANGE)) for band in bands.values()),
    ]
    return [Table("Mean over the weights of each tower", head, rows)] if rows else []


def findings(index: Index) -> list[Table]:
    """Level and shape of each model and tower, and what they are beyond."""
    rows = []
    for each in judgements(index.results.rows):
        name, gap = each.nearest or ("", None)
        rows.append(
            [
                Cell(each.model, f"{each.where}, {each.band.replace('-', units.RANGE)}"),
                value_cell(units.metric("level"), each.level),
                value_cell(units.metric("shape"), each.shape),
                value_cell(units.metric("shape"), gap),
                Cell(name.replace("_", " ") or units.ABSENT),
                Cell(WORDS[each.finding]),
            ]
        )
    head = [
        Cell("Model"),
        Cell("Level", "gain common to all ranks"),
        Cell("Shape", "log of tail over head gain"),
        Cell("Shape beyond", "the nearest control"),
        Cell("Nearest control"),
        Cell("Finding"),
    ]
    return [Table("Level and shape, mean over weights, or of features", head, rows)] if rows else []
