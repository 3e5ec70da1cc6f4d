"""Whether quantization damps the last rank band of the weights more than white noise of equal norm does."""

from __future__ import annotations

import dataclasses
from typing import Any

from qclip.spectral import verdict

from . import svg, units
from .index import CONTROL, Index


@dataclasses.dataclass(frozen=True)
class Tail:
    """The last rank band of one model and tower, beside white noise of equal norm. `said` is the finding."""

    model: str
    tower: str
    band: str
    gain: dict
    white: dict | None
    difference: dict
    said: str


DAMPED, RAISED, UNCLEAR = "damped beyond the control", "raised beyond the control", "cannot be told"


def tails(index: Index) -> list[Tail]:
    """Damping needs a gain below 1 and a paired difference to the control below 0, both intervals clear."""
    last: dict[tuple[str, str], dict] = {}
    for row in index.rows("gain"):
        at = (row["model"], row["set"])
        if row["role"] == "tower" and row["reference"] == CONTROL and row["at"] > last.get(at, {"at": -1})["at"]:
            last[at] = row
    out = []
    for (model, tower), row in last.items():
        where = {"set": tower, **in_band(row["at"], row["subset"])}
        gain, white = index.row(model, "gain", **where), index.row(model, "gain_white", **where)
        if gain is not None and gain["value"] is not None and row["value"] is not None:
            said = UNCLEAR
            if svg.finite(gain["low"], gain["high"], row["low"], row["high"]):
                said = (
                    DAMPED
                    if row["high"] < 0 and gain["high"] < 1
                    else RAISED
                    if row["low"] > 0 and gain["low"] > 1
                    else UNCLEAR
                )
            out.append(Tail(model, tower, row["subset"], gain, white, row, said))
    return out


def damping(index: Index) -> list[str]:
    """What can be said of the last band: one sentence for each finding, then the numbers of each model and tower."""
    found = tails(index)
    ends = {
        DAMPED: "That is a sign of filtering, not proof: the other controls and the effect on reliability are not "
        "looked at here.",
        RAISED: "That is the opposite of filtering.",
        UNCLEAR: "It shows nothing that white noise of equal norm would not.",
    }
    leads = {
        DAMPED: "The last rank band is damped beyond the control in",
        RAISED: "The last rank band is raised beyond the control in",
        UNCLEAR: "Whether the last rank band is damped cannot be told in",
    }
    out = []
    for finding, end in ends.items():
        towers: dict[str, list[str]] = {}
        for tail in found:
            if tail.said == finding:
                towers.setdefault(tail.model, []).append(tail.tower)
        if towers:
            listed = [f"{model} ({units.words(names)})" for model, names in towers.items()]
            out.append(f"{leads[finding]} {units.words(listed)}. {end}")
    return out + verdict(index.results.rows)


def in_band(start: float, name: str) -> dict[str, Any]:
    """The columns of a row that say its rank band: `at` is its first rank, `subset` its name."""
    return {"axis": "band", "at": start, "subset": name}
