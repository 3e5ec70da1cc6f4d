"""Whether quantization damps the tail of a tower's weights more than white noise of equal norm does: the one rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Damping:
    """The last rank band of one model and tower, means over its sites. Every row has a value and an interval."""

    model: str
    tower: str
    gain: Row
    white: Row  # gain of white noise of equal norm
    difference: Row  # gain minus that of white noise, paired
    excess: Row | None  # SQNR above white noise, in dB

    @property
    def band(self) -> str:
        return str(self.gain["subset"])

    @property
    def finding(self) -> Literal["damped", "raised", "open"]:
        """Damped needs a gain whose interval lies below 1 and a difference whose interval lies below 0, raised both
        above; everything else cannot be told."""
        if self.difference["high"] < 0 and self.gain["high"] < 1:
            return "damped"
        return "raised" if self.difference["low"] > 0 and self.gain["low"] > 1 else "open"


def damping(rows: Iterable[Row]) -> list[Damping]:
    """One for each quantized model and tower of `weight_spectrum`'s rows; a tower whose rows lack an interval is left
    out. None of them is about reliability."""
    found: dict[tuple[str, str], dict[tuple[str, str, float], Row]] = {}
    for row in rows:
        known = all(isinstance(row.get(bound), int | float) for bound in ("value", "low", "high"))
        if known and row.get("metric") in ("gain", "gain_white", "sqnr") and row.get("role") == "tower":
            key = (row["metric"], row.get("reference") or "", row["at"])
            found.setdefault((row["model"], row["set"]), {})[key] = row
    out = []
    for (model, tower), by_key in found.items():
        tail = max((at for metric, reference, at in by_key if (metric, reference) == ("gain", "white")), default=-1)
        if {("gain", "", tail), ("gain_white", "", tail)} <= by_key.keys():
            rows_of_tail = by_key["gain", "", tail], by_key["gain_white", "", tail], by_key["gain", "white", tail]
            out.append(Damping(model, tower, *rows_of_tail, by_key.get(("sqnr", "white", tail))))
    return out


def verdict(rows: Iterable[Row]) -> list[str]:
    """One sentence for each quantized model and tower: whether the tail of the float basis is damped."""
    out = []
    for each in damping(rows):
        if each.finding == "damped":
            lost = 100 * (1 - each.gain["value"] ** 2)
            said = f"damping beyond the control, by {lost:.1f} % of the band's energy"
        elif each.finding == "raised":
            won = 100 * (each.gain["value"] ** 2 - 1)
            said = f"amplification beyond the control, by {won:.1f} % of the band's energy"
        else:
            said = "whether the tail is damped cannot be told"
        above = "" if each.excess is None else f"; SQNR {_shown(each.excess, 2)} dB above white"
        out.append(
            f"{each.model}, {each.tower} tower, {each.band}: {said}; gain {_shown(each.gain, 4)}, white noise of equal "
            f"norm {_shown(each.white, 4)}, difference {_shown(each.difference, 4)}{above} ({each.gain['n']} sites)."
        )
    return out


def _shown(row: Row, digits: int) -> str:
    return f"{row['value']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
