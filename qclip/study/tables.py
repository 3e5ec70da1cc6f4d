"""Tables of what a study measured: each variant beside float, with intervals.

A value that is undefined is shown as such, with its reason below; a cell that failed or is missing is named, and no
mean is taken over what is left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qclip.metrics import metric
from qclip.reporting import units

from . import wins
from .cells import Block
from .found import ALL, Asked, Found
from .store import StudyStore


@dataclasses.dataclass(frozen=True)
class Printed:
    """A table as text, and what is said below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = dataclasses.field(default_factory=list)


def printed(found: Found, store: StudyStore, asked: Asked = ALL) -> list[Printed]:
    """For each model and evaluation: the metrics on every set, the means over severities, and joint wins."""
    out = []
    for (model, evaluation), blocks in found.grid.evaluations().items():
        lines = [each for each in found.lines if (each["model"], each["evaluation"]) == (model, evaluation)]
        title = f"{model} on {evaluation}"
        clean = [each for each in lines if not each["corruption"] and each["metric"] in asked.metrics]
        if asked.corruption is None:
            out += _wide(title, blocks, clean, lambda line: (line["metric"], line["set"], ""), found)
            noisy = [each for each in lines if each["corruption"] and each["metric"].startswith("mean_")]
            out += _wide(
                f"{title}, means over severities",
                blocks,
                noisy,
                lambda line: (line["metric"], line["corruption"], ""),
                found,
            )
            out += _wins(title, blocks, store, found)
        else:
            out += _wide(
                f"{title} under {asked.corruption}",
                blocks,
                lines,
                lambda line: (line["metric"], line["set"], _severity(line)),
                found,
            )
    return out


Place = tuple[str, str, str]


def _wide(
    title: str,
    blocks: Sequence[Block],
    lines: Sequence[dict[str, Any]],
    place: Callable[[dict[str, Any]], Place],
    found: Found,
) -> list[Printed]:
    """A row per variant: absolute values of float, then of each variant the value and its difference."""
    places = list(dict.fromkeys(place(line) for line in lines))
    if not places:
        return []
    by = {(line["variant"], place(line)): line for line in lines}
    columns = ["variant", "method", "bits"]
    columns += [" ".join(filter(None, (metric(name).label, *rest))) for name, *rest in places]
    rows, notes = [], []
    for block in blocks:
        label = block.variant.label
        about = next((line for (variant, _), line in by.items() if variant == label), {})
        row = [label, str(about.get("method") or ""), str(about.get("bits") or "")]
        for each in places:
            line = by.get((label, each))
            row.append(_text(line) if line else _absent(block, found))
            if line and line["reason"]:
                notes.append(f"{metric(each[0]).label} of {label} on {each[1]} is undefined: {line['reason']}")
        rows.append(row)
    return [Printed(title, columns, rows, list(dict.fromkeys(notes)))]


def _severity(line: Mapping[str, Any]) -> str:
    if line["metric"].startswith("mean_"):
        return ""
    return f"severity {line['severity']}" if line["severity"] else "uncorrupted"


def _text(line: Mapping[str, Any]) -> str:
    measure = units.metric(line["metric"])
    if math.isnan(line["value"]):
        return "undefined"
    if line["difference"] is None or math.isnan(line["difference"]):
        return f"{measure.value(line['value'])} {measure.interval(line['low'], line['high'])}".strip()
    gap = f"{measure.difference(line['difference'])} "
    gap += measure.difference_interval(line["difference_low"], line["difference_high"])
    return f"{measure.value(line['value'])} ({gap.strip()})"


def _absent(block: Block, found: Found) -> str:
    cells = set(block.cells.values())
    return "failed" if cells & found.failed.keys() else "missing" if cells & found.missing else units.ABSENT


def _wins(title: str, blocks: Sequence[Block], store: StudyStore, found: Found) -> list[Printed]:
    measured = found.grid.plan.measured
    joint = wins.joint(blocks, store, found.runtime, found.score, measured)
    if joint is None:
        return []
    count, n = joint
    row = [str(n), str(count.count), f"{count.expected:.2f}", f"{count.low:.0f} to {count.high:.0f}"]
    row.append(units.probability(count.p) if not math.isnan(count.p) else "undefined")
    columns = ["variants", "win-win-win", "by chance", "95 % of chance", "p"]
    note = (
        f"a win is a better top-1, ECE and AUROC ({found.score}, mean over OOD sets) than float's; chance is that of "
        f"{measured.replicates} paired resamples in which nothing differs and all correlations stay"
    )
    left = sum(not block.variant.is_float for block in blocks) - n
    notes = [note] + ([f"{left} variants are not in it: nothing was measured of them"] if left else [])
    return [Printed(f"{title}: joint wins", columns, [row], notes)]
