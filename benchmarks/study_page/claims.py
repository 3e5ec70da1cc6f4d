"""What a study's rows say of a claim: lines with their differences, and words for counts of intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qclip.data.corruptions import CORRUPTIONS, GROUPS
from qclip.metrics import metric
from qclip.reporting import units
from qclip.study.found import SCORE, joined
from qclip.study.variants import FLOAT

Line = dict[str, Any]
AGREES, DENIES, OPEN = "agrees", "does not agree", "cannot be told"
OOD = ("ood", "ood-near", "ood-far")
CHANCE = 0.025  # of intervals around no difference, told to one side
ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the paper says, what is made of it here, and the counts behind it."""

    said: str
    verdict: str
    because: str


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    claims: list[Claim]
    body: list[str]


class Study:
    """The rows of a study: lines with their differences, by model; what is of towers; joint wins."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        whole = [dict(row) for row in rows if row["subset"] == "all" and not row["axis"]]
        plain = [row for row in whole if row["reference"] in ("", FLOAT) and row["variant"]]
        self.lines = joined(plain)
        self.towers = [row for row in rows if row["role"] == "tower"]
        self.wins = [row for row in rows if row["metric"].startswith("wins")]
        self.models = list(dict.fromkeys(line["model"] for line in self.lines))
        places = {(line["model"], line["evaluation"]) for line in self.lines}
        if len(places) > len(self.models):
            raise ValueError("a model is evaluated on two labelled sets; the page tells of one")

    def differences(self, name: str, roles: Collection[str], model: str = "", score: str = SCORE) -> list[Line]:
        """Lines of a metric on sets of these roles that have a difference, in the order of the plan; "": all models."""
        return [
            line
            for line in self.lines
            if line["metric"] == name and line["role"] in roles and model in ("", line["model"])
            if line["score"] in ("", score) and line["variant"] != FLOAT
            if line["difference"] is not None and not math.isnan(line["difference"])
        ]

    def of_float(self, model: str, name: str) -> Line | None:
        """The line of the float model on the labelled set itself."""
        found = (line for line in self.lines if line["model"] == model and line["variant"] == FLOAT)
        return next((line for line in found if line["metric"] == name and line["role"] == "id"), None)


def clear(line: Line) -> int:
    """1: the interval lies above 0, -1: below, 0: it holds 0."""
    low, high = line["difference_low"], line["difference_high"]
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return 0
    return (low > 0) - (high < 0)


def direction(line: Line) -> int:
    """1: told better than float, -1: worse, 0: not told."""
    return metric(line["metric"]).better * clear(line)


def counted(lines: Sequence[Line]) -> str:
    found = [direction(line) for line in lines]
    chance = 2 * CHANCE * len(found)
    return (
        f"{found.count(1)} better, {found.count(-1)} worse, {found.count(0)} not told, of {len(found)} "
        f"(chance alone would tell about {chance:.1f})"
    )


def lead(toward: int, against: int, n: int) -> str:
    """The verdict on a claim of one direction, of `n` intervals."""
    if toward > against and beyond_chance(toward, n):
        return AGREES
    return DENIES if against > toward and beyond_chance(against, n) else OPEN


def beyond_chance(told: int, n: int) -> bool:
    """Whether at most one of twenty studies would tell as many of `n` independent intervals to one side by chance."""
    fewer = sum(math.comb(n, k) * CHANCE**k * (1 - CHANCE) ** (n - k) for k in range(told))
    return 1 - fewer <= ALPHA


def claim(said: str, lines: Sequence[Line], side: int) -> Claim:
    found = [direction(line) for line in lines]
    if not found:
        return Claim(said, OPEN, "nothing of it was measured")
    return Claim(said, lead(found.count(side), found.count(-side), len(found)), counted(lines))


def cell(line: Line | None) -> str:
    if line is None:
        return ""
    of = units.metric(line["metric"])
    if line["difference"] is None or math.isnan(line["difference"]):
        return "undefined"
    text = of.difference(line["difference"])
    text += f" {of.difference_interval(line['difference_low'], line['difference_high'])}".rstrip()
    return f"**{text}**" if clear(line) else text


def label(name: str) -> str:
    """What a metric is called; of a mean over severities, without saying so."""
    return metric(name.removeprefix("mean_")).label


def place(name: str) -> str:
    """A set by its name, a corruption by what it is called."""
    return units.small(units.corruption(name)) if name in CORRUPTIONS or name in GROUPS else name
