"""Spectra of features: what is left of each rank band, Fourier maps, and gratings."""

from __future__ import annotations

from .. import svg, units
from ..claims import claims
from ..index import Cohort, Index
from ..parts import Cell, Figure, Panel, Table, csv, legend_of, panel, portions, titled, value_cell
from ..plots import Marks, along, lines, points
from . import Section

SIZE, LEFT = 200.0, 10.0  # of a Fourier map


class FeaturesSection(Section):
    name = "features"
    title = "Spectra of the features"
    intro = (
        "What goes into the last projection of the vision tower, on the singular directions of the float model's "
        "features. A gain below 1 in the last bands alone would be a low-pass filter. Noise lowers the signal to noise "
        "ratio of small directions most, whatever it comes from, so controls stand beside each claim."
    )
    absent = "Features were not looked at: `qclip spectrum ... --data DATA` does."

    def panels(self, index: Index) -> list[Panel]:
        out: list[Panel] = []
        parts = portions(index)
        for cohort in parts:
            several = len(parts) > 1
            legend = legend_of(cohort)
            for title, figures in (
                ("Level and shape of the features, beside controls", claims(index, cohort, "id")),
                ("Rank bands of the features", _bands(index, cohort)),
                ("Energy of the features", _energy(index, cohort)),
                ("Fourier spectra of the patch tokens", _fourier(index, cohort)),
                ("Gratings", _gratings(index, cohort)),
            ):
                out += panel(titled(cohort, title, several), figures, legend)
            out += panel(titled(cohort, "Fourier maps of the last block", several), _maps(index, cohort), small=True)
        return out

    def tables(self, index: Index) -> list[Table]:
        return _band_accuracy(index)


def sets(index: Index) -> list[str]:
    """The sets whose features were looked at."""
    return list(dict.fromkeys(row["set"] for row in index.rows("band_energy") if row["role"] == "id"))


def _bands(index: Index, cohort: Cohort) -> list[Figure]:
    out = []
    for name in sets(index):
        for metric, label, rule in (
            ("gain", "gain", 1.0),
            ("sqnr", "SQNR (dB)", None),
            ("band_top1", "top-1 (%)", None),
        ):
            rows = [r for r in index.rows(metric) if r["set"] == name and r["axis"] == "band" and not r["reference"]]
            marks: Marks = {}
            for row in rows:
                marks.setdefault(row["model"], {})[row["at"]] = row
            bands = {row["at"]: row["subset"].removeprefix("ranks ").replace("-", units.RANGE) for row in rows}
            scale = 100.0 if metric == "band_top1" else 1.0
            out += along(cohort, marks, f"{name}: {label} by rank band", label, bands, "ranks", scale, rule)
    return out


def _energy(index: Index, cohort: Cohort) -> list[Figure]:
    out = []
    for name in sets(index):
        curves = {c["model"]: c for c in index.curves("energy_cdf") if c["set"] == name}
        drawn = {m: [(x + 1, y) for x, y in points(c, "rank", "value", 100)] for m, c in curves.items()}
        out += lines(cohort, drawn, f"{name}: energy up to a rank", "rank", "share of the energy (%)")
    return out


def _fourier(index: Index, cohort: Cohort) -> list[Figure]:
    out = []
    found = [c for c in index.curves("fourier_radial") if c["model"] in cohort.models]
    for name in dict.fromkeys(c["set"] for c in found):
        blocks = list(dict.fromkeys(c["at"] for c in found if c["set"] == name))
        for block in dict.fromkeys([blocks[-1], *blocks]):
            drawn = {c["model"]: points(c, "frequency", "value") for c in found if (c["set"], c["at"]) == (name, block)}
            title = f"{name}: {block}"
            out += lines(cohort, drawn, title, "frequency (of Nyquist)", "log amplitude over frequency 0")
    return out


def _maps(index: Index, cohort: Cohort) -> list[Figure]:
    """One map for each model, all on one scale of darkness."""
    curves = [c for model in cohort.models for c in index.curves("fourier_map") if c["model"] == model]
    values = [v for c in curves for v in c["points"]["value"] if svg.finite(v)]
    return [_map(curve, min(values), max(values)) for curve in curves] if values else []


def _map(curve: dict, low: float, high: float) -> Figure:
    columns = curve["points"]
    down, across = sorted(set(columns["u"])), sorted(set(columns["v"]))
    side, tall = SIZE / len(across), SIZE / len(down)
    body = []
    for u, v, value in zip(columns["u"], columns["v"], columns["value"], strict=True):
        if svg.finite(u, v, value):
            tip = svg.element("title", f"{u:g}, {v:g} cycles per patch: {value:.3g}")
            body.append(
                svg.element(
                    "rect",
                    tip,
                    x=LEFT + across.index(v) * side,
                    y=4 + down.index(u) * tall,
                    width=side,
                    height=tall,
                    class_="hit",
                    fill_opacity=round((value - low) / ((high - low) or 1), 3),
                )
            )
    body.append(
        svg.text(
            LEFT + SIZE / 2,
            SIZE + 20,
            f"across: {_cycles(across[0])} to {_cycles(across[-1])} per patch",
            "tick",
            "middle",
        )
    )
    title = f"{curve['model']}, {curve['set']}"
    described = "Log amplitude by frequency in cycles per patch; frequency 0 is in the middle; darker is more."
    drawing = svg.document(SIZE + 2 * LEFT, SIZE + 30, f"Fourier map of {title}", described, body)
    data = csv(("u", "v", "value"), zip(columns["u"], columns["v"], columns["value"], strict=True))
    return Figure(title, drawing, data=data)


def _cycles(frequency: float) -> str:
    return f"{frequency:.2g}".replace("-", units.MINUS)


def _gratings(index: Index, cohort: Cohort) -> list[Figure]:
    out = []
    for metric, label, scale in (("grating_response", "1 - cosine", 1.0), ("grating_top1", "top-1 (points)", 100.0)):
        rows = [r for r in index.rows(metric) if not r["reference"]]
        for name in dict.fromkeys(row["set"] for row in rows):
            marks: Marks = {}
            for row in rows:
                if row["set"] == name:
                    marks.setdefault(row["model"], {})[row["at"]] = row
            places = {row["at"]: f"{row['at']:g}" for row in rows}
            rule = 0.0 if metric == "grating_top1" else None
            title = f"{name}: {label} under a grating"
            out += along(cohort, marks, title, label, places, "cycles per image", scale, rule)
    return out


def _band_accuracy(index: Index) -> list[Table]:
    measures = ("band_top1", "band_top1_own", "band_top1_random", "band_top1_energy")
    out = []
    for name in sets(index):
        bands = {r["at"]: r["subset"] for r in index.rows("band_top1") if r["set"] == name}
        cells_of = []
        for model in index.models:
            for at, band in bands.items():
                key = {"set": name, "subset": band, "axis": "band", "at": at}
                found = [index.row(model, measure, **key) for measure in measures]
                if found[0] is not None:
                    cells = [value_cell(units.metric(m), row) for m, row in zip(measures, found, strict=True)]
                    cells_of.append([Cell(model, band.replace("-", units.RANGE)), *cells])
        head = [Cell("Model"), Cell("Float basis"), Cell("Own basis"), Cell("Random", "as many directions")]
        head.append(Cell("Random", "equal energy"))
        if cells_of:
            out.append(Table(f"Top-1 accuracy on {name} from features within a rank band", head, cells_of))
    return out
