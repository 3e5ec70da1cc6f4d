"""From the responses of single weights to rows: of each site, and means over the sites of a tower with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qclip.results import Results

from .bands import BANDS, in_band, level_of, shape_of
from .controls import Claim, Control
from .intervals import Estimate, one_more, over_sites

OWN = ("band_energy", "band_gap", "effective_rank", "stable_rank")  # of the weight's own spectrum


@dataclasses.dataclass(frozen=True)
class Response:
    """What one quantized weight is on the float basis, by band, and what the controls would be in its place."""

    model: str
    site: str
    energy: dict[str, float]  # of the float weight
    gains: dict[str, float]
    controls: dict[str, dict[str, np.ndarray]]  # control -> band -> gain of each draw
    by_band: dict[str, dict[str, float]]  # metric -> band -> value
    by_rank: dict[str, list[float | None]]

    @property
    def tower(self) -> str:
        return self.site.split(".", 1)[0]

    def claim(self, claim: Claim, gains: Mapping[str, float]) -> float | None:
        """`level` or `shape` of gains by band at this site."""
        return level_of(gains, self.energy) if claim == "level" else shape_of(gains)

    def drawn(self, claim: Claim, control: str) -> np.ndarray | None:
        """The same of every draw of a control; None where it is undefined or was not drawn."""
        if control not in self.controls:
            return None
        by_band = self.controls[control]
        draws = [dict(zip(by_band, gains, strict=True)) for gains in zip(*by_band.values(), strict=True)]
        values = [self.claim(claim, gains) for gains in draws]
        return None if None in values else np.array(values, float)

    def write(self, results: Results) -> None:
        common = {"model": self.model, "set": self.site, "role": "site"}
        for metric, found in {"gain": self.gains, **self.by_band}.items():
            for band, value in found.items():
                results.add(**common, **in_band(band), metric=metric, value=value)
        for band, draws in self.controls.get("white", {}).items():
            results.add(**common, **in_band(band), metric="gain_white", n=len(draws), **one_more(draws).columns)
        for claim in ("level", "shape"):
            results.add(**common, metric=claim, value=self.claim(claim, self.gains))
        results.add_curve(self.by_rank, **common, metric="by_rank")


def write(results: Results, responses: Iterable[Response], controls: Mapping[str, Control]) -> None:
    """The rows of every tower, from the rows and responses of its sites."""
    _own_spectra(results)
    groups: dict[tuple[str, str], list[Response]] = {}
    for each in responses:
        groups.setdefault((each.model, each.tower), []).append(each)
    for (model, tower), found in groups.items():
        common = {"model": model, "set": tower, "role": "tower"}
        _bands(results, common, found)
        for claim in ("level", "shape"):
            _claim(results, common, found, claim, controls)
        for name in controls:
            _control_curve(results, common, found, name)
        left_out = [name for name in controls if not any(name in each.controls for each in found)]
        if "uniform" in left_out:
            results.note(f"{model}: its {tower} layers tell no steps of a grid, so there is no uniform control")


def _own_spectra(results: Results) -> None:
    by_tower: dict[tuple[str, str, str, str], list[float]] = {}
    for row in results.rows:
        if row["metric"] in OWN:
            key = (row["model"], row["set"].split(".", 1)[0], row["metric"], row["subset"] if row["axis"] else "")
            by_tower.setdefault(key, []).append(row["value"])
    for (model, tower, metric, band), values in by_tower.items():
        where = {"model": model, "set": tower, "role": "tower"} | (in_band(band) if band else {})
        results.add(**where, metric=metric, value=float(np.mean(values)), n=len(values))


def _bands(results: Results, common: dict[str, Any], found: list[Response]) -> None:
    for band in (name for name in BANDS if any(name in each.gains for each in found)):
        there = [each for each in found if band in each.gains]
        where = common | in_band(band) | {"n": len(there)}
        gain = np.array([each.gains[band] for each in there])
        _add(results, where, "gain", over_sites(gain))
        white = [each.controls["white"][band] for each in there if "white" in each.controls]
        if len(white) == len(there):
            _add(results, where, "gain_white", over_sites(np.array(white)))
            _add(results, where, "gain", over_sites(gain[:, None] - np.array(white)), "white")
        for metric in there[0].by_band:
            values = [each.by_band[metric][band] for each in there if band in each.by_band[metric]]
            if len(values) == len(there) and np.isfinite(values).all():
                _add(results, where, metric, over_sites(np.array(values)))
        excess = [each.by_band["sqnr"][band] - each.by_band["sqnr_white"][band] for each in there]
        if np.isfinite(excess).all():
            _add(results, where, "sqnr", over_sites(np.array(excess)), "white")


def _claim(
    results: Results,
    common: dict[str, Any],
    found: list[Response],
    claim: Claim,
    controls: Mapping[str, Control],
) -> None:
    """The tower's level or shape, that of each control, and the paired differences to them."""
    own = {each.site: each.claim(claim, each.gains) for each in found}
    there = [each for each in found if own[each.site] is not None]
    if not there:
        return
    _add(results, common | {"n": len(there)}, claim, over_sites(np.array([own[each.site] for each in there], float)))
    for name in controls:
        pairs = [(own[each.site], each.drawn(claim, name)) for each in there]
        both = [(value, drawn) for value, drawn in pairs if drawn is not None]
        if both:
            draws = np.array([drawn for _, drawn in both])
            gap = np.array([value for value, _ in both], float)[:, None] - draws
            where = common | {"n": len(both)}
            _add(results, where | {"axis": "control", "at": name}, claim, over_sites(draws))
            _add(results, where, claim, over_sites(gap), name)


def _control_curve(results: Results, common: dict[str, Any], found: list[Response], name: str) -> None:
    points: dict[str, list[float | None]] = {"band": [], "value": [], "low": [], "high": []}
    for band, (start, _) in BANDS.items():
        there = [each.controls[name][band] for each in found if band in each.controls.get(name, {})]
        if there:
            estimate = over_sites(np.array(there))
            for column, value in zip(points.values(), (start, *estimate.columns.values()), strict=True):
                column.append(value)
    if points["band"]:
        results.add_curve(points, **common, metric="gain", axis="control", at=name)


def _add(results: Results, where: dict[str, Any], metric: str, estimate: Estimate, reference: str = "") -> None:
    results.add(**where, metric=metric, reference=reference, **estimate.columns)
