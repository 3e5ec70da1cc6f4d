"""Tables of absolute values: what every model scored, set by set, with intervals."""

from __future__ import annotations

import dataclasses

from . import units
from .damping import in_band, tails
from .index import WHOLE, Index
from .svg import finite

LABELLED = (
    "top1",
    "top5",
    "balanced_accuracy",
    "ece",
    "ece_ts",
    "signed_gap",
    "nll",
    "brier",
    "mean_confidence",
    "temperature",
)
MOST_SITES = 2000  # rows of the site table of one model


@dataclasses.dataclass(frozen=True)
class Cell:
    text: str
    small: str = ""  # below the text: an interval, or a unit in a heading


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table whose first column names what the row is about."""

    title: str
    head: list[Cell]
    rows: list[list[Cell]]
    note: str = ""


def _cell(measure: units.Metric, row: dict | None) -> Cell:
    if row is None:
        return Cell(units.ABSENT)
    return Cell(measure.value(row["value"]), measure.interval(row["low"], row["high"]))


def _heading(name: str) -> Cell:
    measure = units.metric(name)
    hint = {1: "higher is better", -1: "lower is better", 0: ""}[measure.better]
    return Cell(measure.name, "points, + is overconfident" if name == "signed_gap" else hint)


def labelled(index: Index) -> list[Grid]:
    """A grid for each labelled set: one row a model, and a model and part where the set has parts."""
    sets = dict.fromkeys([*index.id_sets, *index.shift_sets, *index.spurious_sets])
    return [grid for name in sets if (grid := _labelled(index, name))]


def _labelled(index: Index, name: str) -> Grid | None:
    columns = [
        metric
        for metric in LABELLED
        if any(row["set"] == name and row["value"] is not None for row in index.rows(metric))
    ]
    grouped = [m for m in ("worst_group_top1", "group_gap") if any(row["set"] == name for row in index.rows(m))]
    rows = []
    for part in [WHOLE, *index.parts(name)]:
        n = index.n(name, part=part)
        for model in index.models:
            found = [index.row(model, metric, set=name, **part.key) for metric in columns]
            if any(row is not None and row["value"] is not None for row in found):
                cells = [_cell(units.metric(metric), row) for metric, row in zip(columns, found, strict=True)]
                cells += [
                    _cell(units.metric(m), index.row(model, m, set=name) if part == WHOLE else None) for m in grouped
                ]
                label = Cell(model, f"{part.name}, n = {units.count(n)}" if part.name else "")
                rows.append([label, *cells])
    if not rows:
        return None
    n = index.n(name)
    head = [Cell("Model"), *map(_heading, columns), *map(_heading, grouped)]
    return Grid(name, head, rows, f"n = {units.count(n)}" if n else "")


def detection(index: Index) -> list[Grid]:
    """A grid for each OOD set: AUROC and FPR95 by score."""
    out = []
    for name, kind in [*index.ood_sets, *((name, "") for name in index.ood_means)]:
        columns = [(score, metric) for score in index.ood_scores for metric in ("auroc", "fpr95")]
        rows = []
        for model in index.models:
            found = [index.row(model, metric, set=name, score=score) for score, metric in columns]
            if any(found):
                cells = [_cell(units.metric(metric), row) for (_, metric), row in zip(columns, found, strict=True)]
                rows.append([Cell(model), *cells])
        head = [Cell(units.metric(metric).name, units.SCORES.get(score, score)) for score, metric in columns]
        n = None if name in index.ood_means else index.n(name)
        notes = [f"{kind} OOD"] * bool(kind) + [f"n = {units.count(n)}"] * bool(n)
        out.append(Grid(name, [Cell("Model"), *head], rows, ", ".join(notes)))
    return out


def corrupted(index: Index) -> list[Grid]:
    """A grid for each corruption and set: top-1 and ECE at each severity, and their means."""
    out = []
    for name, corruption in index.corrupted:
        here = {"set": name, "corruption": corruption}
        columns: list[tuple[str, int]] = [
            (metric, severity) for metric in ("top1", "ece") for severity in index.severities(name, corruption)
        ]
        columns += [(metric, 0) for metric in ("mean_top1", "mean_ece")]
        columns = [(m, s) for m, s in columns if any(index.row(model, m, severity=s, **here) for model in index.models)]
        rows = []
        for model in index.models:
            found = [index.row(model, m, severity=s, **here) for m, s in columns]
            if any(found):
                cells = [_cell(units.metric(m), row) for (m, _), row in zip(columns, found, strict=True)]
                rows.append([Cell(model), *cells])
        head = [Cell("Model")] + [
            Cell(_short(m), "mean, 1 and above" if m.startswith("mean_") else f"severity {s}") for m, s in columns
        ]
        n = index.n(name, corruption)
        out.append(Grid(f"{units.title(corruption)} on {name}", head, rows, f"n = {units.count(n)}" if n else ""))
    return out


def _short(metric: str) -> str:
    return "Top-1" if metric.endswith("top1") else "ECE"


def agreement(index: Index) -> list[Grid]:
    """How near each model's outputs are to its reference's, image by image."""
    metrics = ("cosine_mean", "cosine_min", "agreement", "flips_lost", "flips_won", "mcnemar_p")
    heads = {
        "agreement": Cell("Same prediction"),
        "flips_lost": Cell("Lost", "right to wrong"),
        "flips_won": Cell("Won", "wrong to right"),
        "mcnemar_p": Cell("McNemar", "mid-p"),
        "cosine_mean": Cell("Mean cosine", "of embeddings"),
        "cosine_min": Cell("Smallest", "cosine"),
    }
    out = []
    sets = list(dict.fromkeys(row["set"] for row in index.rows("agreement", "cosine_mean")))
    for name in sets:
        rows = []
        for family in index.families:
            for model in family.variants:
                found = [index.row(model, m, set=name, reference=family.reference) for m in metrics]
                if any(found):
                    cells = [_agreement_cell(m, row) for m, row in zip(metrics, found, strict=True)]
                    rows.append([Cell(model), *cells])
        if rows:
            out.append(Grid(name, [Cell("Model"), *(heads[m] for m in metrics)], rows))
    return out


def _agreement_cell(metric: str, row: dict | None) -> Cell:
    if row is None or row["value"] is None:
        return Cell(units.ABSENT)
    if metric.startswith("flips"):
        return Cell(units.count(row["value"]))
    if metric == "mcnemar_p":
        return Cell("< 0.001" if row["value"] < 0.001 else f"{row['value']:.3f}")
    return _cell(units.metric(metric), row)


def ranks(index: Index) -> list[Grid]:
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
    return [Grid("Mean over the weights of each tower", head, rows)] if rows else []


def last_bands(index: Index) -> list[Grid]:
    """The last rank band of each model and tower, beside the control."""
    gain = units.metric("gain")
    rows = []
    for tail in tails(index):
        difference = Cell(
            gain.difference(tail.difference["value"]),
            gain.difference_interval(tail.difference["low"], tail.difference["high"]),
        )
        band = tail.band.replace("-", units.RANGE)
        rows.append(
            [
                Cell(tail.model, f"{tail.tower} tower, {band}"),
                _cell(gain, tail.gain),
                _cell(gain, tail.white),
                difference,
                Cell(tail.said),
            ]
        )
    head = [Cell("Model"), Cell("Gain"), Cell("White noise", "of equal norm"), Cell("Difference"), Cell("Damping")]
    return [Grid("The last rank band, mean over weights", head, rows)] if rows else []


def sites(index: Index) -> list[Grid]:
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
        out.append(Grid(model, head, rows, f"{units.count(len(found))} sites{left_out}"))
    return out
