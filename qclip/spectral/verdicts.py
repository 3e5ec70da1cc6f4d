"""What may be said of a tower's quantized weights: the one rule (docs/methods.md, Spectra).

Two things are asked apart. *Shape*: is the tail damped more than the head, and more than under every control? That, and
only that, is filtering. *Level*: is the gain common to all ranks below 1, and below that of noise? That is a shrink.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from .controls import CONTROLS, Claim

Row = Mapping[str, Any]
Finding = Literal["damped", "raised", "shrunk", "grown", "open"]

WHERE = ("tower", "id")  # the weights of a tower, or the features of a set of images
ALIKE = 0.5  # a shape within this share of the level's log is no shape: the shrink is the same in every band


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One quantized model's tower, means over its sites, or its features on a set of images; every row has a value and
    an interval. `beyond_level` and `beyond_shape` are the paired differences to each control that was drawn."""

    model: str
    tower: str  # or the name of the set
    level: Row
    shape: Row
    tail: Row  # gain of the last band
    head: Row  # gain of the first
    beyond_level: dict[str, Row]
    beyond_shape: dict[str, Row]
    excess: Row | None  # SQNR of the last band above white noise, in dB

    @property
    def band(self) -> str:
        return str(self.tail["subset"])

    @property
    def where(self) -> str:
        return f"features on {self.tower}" if self.level["role"] == "id" else f"{self.tower} tower"

    @property
    def finding(self) -> Finding:
        """damped: the tail's gain below 1, the shape below 0 and below that of every control, all intervals clear;
        raised: all of it above. Else shrunk: the level below 1 and below that of all noise; grown: above."""
        shapes = [row for name, row in self.beyond_shape.items() if excludes("shape", name)]
        if _below(0, self.shape, *shapes) and _below(1, self.tail):
            return "damped"
        if _above(0, self.shape, *shapes) and _above(1, self.tail):
            return "raised"
        levels = [row for name, row in self.beyond_level.items() if excludes("level", name)]
        if _below(1, self.level) and _below(0, *levels):
            return "shrunk"
        return "grown" if _above(1, self.level) and _above(0, *levels) else "open"

    @property
    def alike(self) -> bool:
        """Whether a level other than 1 is known to be the same in tail and head."""
        whole = abs(math.log(self.level["value"])) if self.level["value"] > 0 else 0
        return max(abs(self.shape["low"]), abs(self.shape["high"])) < ALIKE * whole

    @property
    def nearest(self) -> tuple[str, Row] | None:
        """The control whose shape comes nearest to this one, of those that a shape must lie beyond."""
        there = {name: row for name, row in self.beyond_shape.items() if excludes("shape", name)}
        return min(there.items(), key=lambda pair: abs(pair[1]["value"]), default=None)


def excludes(claim: Claim, control: str) -> bool:
    """Whether a claim must lie beyond this control. One that is not installed here is held against a shape."""
    return claim in CONTROLS.get(control).excludes if control in CONTROLS else claim == "shape"


def _below(bound: float, *rows: Row) -> bool:
    return all(row["high"] < bound for row in rows)


def _above(bound: float, *rows: Row) -> bool:
    return all(row["low"] > bound for row in rows)


def judgements(rows: Iterable[Row]) -> list[Judgement]:
    """One for each quantized model and tower of `weight_spectrum`'s rows, and each set of `feature_spectrum`'s. Where
    level and shape have no interval (one site), or were compared with no white noise, there is none. None of them is
    about reliability."""
    found: dict[tuple[str, str], dict[tuple[str, str, Any], Row]] = {}
    for row in rows:
        known = all(isinstance(row.get(bound), int | float) for bound in ("value", "low", "high"))
        if known and row.get("role") in WHERE and row.get("metric") in ("level", "shape", "gain", "sqnr"):
            found.setdefault((row["model"], row["set"]), {})[row["metric"], row.get("reference") or "", row["at"]] = row
    out = []
    for (model, tower), by_key in found.items():
        starts = [at for metric, reference, at in by_key if (metric, reference) == ("gain", "")]
        own = {("level", "", None), ("shape", "", None), ("level", "white", None), ("shape", "white", None)}
        if own <= by_key.keys() and len(starts) > 1:
            beyond = {
                claim: {r: row for (metric, r, at), row in by_key.items() if metric == claim and r and at is None}
                for claim in ("level", "shape")
            }
            out.append(
                Judgement(
                    model=model,
                    tower=tower,
                    level=by_key["level", "", None],
                    shape=by_key["shape", "", None],
                    tail=by_key["gain", "", max(starts)],
                    head=by_key["gain", "", min(starts)],
                    beyond_level=beyond["level"],
                    beyond_shape=beyond["shape"],
                    excess=by_key.get(("sqnr", "white", max(starts))),
                )
            )
    return out


def verdict(rows: Iterable[Row]) -> list[str]:
    """One sentence for each quantized model and tower: a filter, a shrink, or nothing that noise would not do."""
    return [
        f"{each.model}, {each.where}, {each.band}: {_said(each)}; level {_shown(each.level)}, shape "
        f"{_shown(each.shape)}, gain {_shown(each.head)} in the head and {_shown(each.tail)} in the tail"
        f"{_above_white(each)} ({each.shape['n']} {'images' if each.level['role'] == 'id' else 'sites'})."
        for each in judgements(rows)
    ]


def _said(each: Judgement) -> str:
    change = 100 * (1 - each.level["value"])
    if each.finding in ("damped", "raised"):
        lost = 100 * (1 - each.tail["value"] ** 2)
        word = "high-rank damping" if each.finding == "damped" else "high-rank amplification"
        size = f"by {abs(lost):.1f} % of the band's energy"
        name, gap = each.nearest or ("none", each.shape)
        return f"{word} beyond every control, {size}; shape {_shown(gap)} beyond the nearest control, {name}"
    if each.finding in ("shrunk", "grown"):
        word = "shrink" if each.finding == "shrunk" else "growth"
        if each.alike:
            return f"a uniform {word} by {abs(change):.2f} %, no filter"
        reason = "whether it is the same in every band cannot be told"
        if not each.shape["low"] <= 0 <= each.shape["high"]:
            reason = f"its shape is reached by a control ({', '.join(_reached(each))})"
        return f"a {word} by {abs(change):.2f} %, not shown to be a filter: {reason}"
    if each.shape["low"] <= 0 <= each.shape["high"]:
        return "nothing that white noise of equal norm would not show"
    return f"whether the tail is damped cannot be told: its shape is reached by a control ({', '.join(_reached(each))})"


def _reached(each: Judgement) -> list[str]:
    """Controls whose shape cannot be told from this one, or lies on the far side of it."""
    far = _above if each.shape["value"] > 0 else _below
    reached = [n for n, row in each.beyond_shape.items() if excludes("shape", n) and not far(0, row)]
    return reached or ["the gain of the tail itself is not clear of 1"]


def _above_white(each: Judgement) -> str:
    return "" if each.excess is None else f"; SQNR {_shown(each.excess, 2)} dB above white"


def _shown(row: Row, digits: int = 4) -> str:
    value, low, high = (f"{row[end]:z.{digits}f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
