"""What the page of a study shows, as data: for each metric and place the differences of all variants to float, and of
each variant what it costs. The page's script only draws it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qclip.metrics import metric
from qclip.reporting import svg, units

from .cells import Block
from .found import LATENCY, MEMORY, Found
from .sizes import Size
from .variants import FLOAT

AGAINST = {"size": "Size of what is shipped (MB)", "memory": "Size in memory (MB)"}
AGAINST |= {"time": "Time for one image (ms), noted in passing"}
NO_IMAGES = ("model", "site", "tower")  # roles of what is measured on no images
Line = Mapping[str, Any]
Key = tuple[str, str]  # metric and place


def views(
    found: Found, metrics: Sequence[str], sizes: Mapping[tuple[str, str], Size], pages: Mapping[int, str]
) -> dict[str, Any]:
    """JSON of the whole page. pages: of blocks by id, the file that a variant leads to.

    `parts`: one per model and evaluation, each with its variants, float first; `cells` of a part: for "metric|place" a
    list along its variants of `[value, difference as text, all in words, side, shade]` or null, where value is in the
    units of the plot, side "better" or "worse" where the interval is clear of 0, shade 0 to 100 over all parts.
    `fronts`: of the same the variants that no other beats in both, by what it is plotted against.
    """
    shown: dict[Key, dict[tuple[str, str, str], Line]] = {}
    places: dict[str, tuple[str, str]] = {}
    for line in found.lines:
        if (key := _key(line, metrics)) is not None:
            places.setdefault(key[1], _place(line))
            shown.setdefault(key, {})[line["model"], line["evaluation"], line["variant"]] = line
    reach = {key: _reach(lines.values()) for key, lines in shown.items()}
    parts = [_part(blocks, found, shown, reach, sizes, pages) for blocks in found.grid.evaluations().values()]
    names = dict.fromkeys(name for name in metrics for key in shown if key[0] == name)
    return {
        "metrics": [_metric(name, [place for of, place in shown if of == name]) for name in names],
        "places": {key: {"label": label, "group": group} for key, (label, group) in places.items()},
        "against": AGAINST,
        "marks": [str(svg.marker(0, 0, series)) for series in range(svg.SERIES)],
        "parts": parts,
    }


def _key(line: Line, metrics: Sequence[str]) -> Key | None:
    """Metric and place of a line that is shown. The labelled set, and the mean over OOD sets, are one place for all
    models, whatever their sets are called."""
    name = line["metric"]
    if line["role"] in NO_IMAGES:
        return None
    if line["corruption"]:
        base = name.removeprefix("mean_")
        return (base, f"under {line['corruption']}") if base != name and base in metrics else None
    if name not in metrics:
        return None
    return name, {"id": "id", "ood-mean": "ood-mean"}.get(line["role"], f"on {line['set']}")


def _place(line: Line) -> tuple[str, str]:
    """What a place is called, and among which it is listed."""
    role = line["role"]
    if line["corruption"]:
        return f"{units.corruption(line['corruption'])}, mean over severities", "Corruptions"
    if role == "id":
        return "the labelled set", "Sets as they are"
    if role == "ood-mean":
        return "mean over OOD sets", "OOD sets"
    kind = {"ood-near": ", near", "ood-far": ", far"}.get(role, "")
    group = "OOD sets" if role.startswith("ood") else "Shifted sets" if role == "shift" else "Sets as they are"
    return line["set"] + kind, group


def _metric(name: str, places: Sequence[str]) -> dict[str, Any]:
    measure = units.metric(name)
    axis = measure.name + (" (%)" if measure.share else "")
    return {"name": name, "label": measure.name, "axis": axis, "better": measure.better, "places": list(places)}


def _reach(lines: Iterable[Line]) -> float:
    """The largest difference among them."""
    gaps = [abs(line["difference"]) for line in lines if svg.finite(line["difference"])]
    return max(gaps, default=0.0)


def _part(
    blocks: Sequence[Block],
    found: Found,
    shown: Mapping[Key, Mapping[tuple[str, str, str], Line]],
    reach: Mapping[Key, float],
    sizes: Mapping[tuple[str, str], Size],
    pages: Mapping[int, str],
) -> dict[str, Any]:
    """One model on one evaluation."""
    model, evaluation = blocks[0].variant.model, blocks[0].sets.data
    costs = {
        (line["variant"], line["metric"]): line["value"]
        for line in found.lines
        if (line["model"], line["evaluation"]) == (model, evaluation) and line["metric"] in (MEMORY, LATENCY)
        if not math.isnan(line["value"])
    }
    about = {line["variant"]: line for lines in shown.values() for line in lines.values() if line["model"] == model}
    variants: list[dict[str, Any]] = []
    for block in blocks:
        label = block.variant.label
        method, bits = _method(block, about.get(label))
        cells = set(block.cells.values())
        lost = "failed" if cells & found.failed.keys() else "missing" if cells & found.missing else ""
        size = sizes.get((model, label), Size(None, None)).bytes
        memory = costs.get((label, MEMORY))
        cost = {
            "size": None if size is None else size / 1e6,
            "memory": None if memory is None else memory / 1e6,
            "time": costs.get((label, LATENCY)),
        }
        page = pages.get(id(block), "")
        variants.append({"name": label, "method": method, "bits": bits, "page": page, "lost": lost, **cost})
    table: dict[str, list[Any]] = {}
    fronts: dict[str, dict[str, list[int]]] = {}
    for (name, place), lines in shown.items():
        here = [lines.get((model, evaluation, block.variant.label)) for block in blocks]
        if any(here):
            row = [None if line is None else _cell(line, reach[name, place]) for line in here]
            table[f"{name}|{place}"] = row
            values = [None if cell is None else cell[0] for cell in row]
            side = metric(name).better or 1
            fronts[f"{name}|{place}"] = {
                cost: front([each[cost] for each in variants], values, side) for cost in AGAINST
            }
    title = f"{model} on {evaluation}"
    return {"model": model, "title": title, "variants": variants, "cells": table, "fronts": fronts}


def _method(block: Block, line: Line | None) -> tuple[str, str]:
    """What a variant's row and column in a heat map are called."""
    recipe = block.variant.recipe
    if block.variant.is_float:
        return FLOAT, ""
    if recipe is not None:
        return recipe.method, recipe.bits
    return (line["method"], line["bits"]) if line and line["method"] else (block.variant.label, "artifact")


def _cell(line: Line, reach: float) -> list[Any]:
    measure, better = units.metric(line["metric"]), metric(line["metric"]).better
    value = line["value"]
    if math.isnan(value):
        return [None, "undefined", f"{line['variant']}: {line['reason'] or 'undefined'}", "", 0]
    plotted = round(value * (100 if measure.share else 1), 6)
    whole = f"{line['variant']}: {measure.value(value)}"
    gap, low, high = (line[name] for name in ("difference", "difference_low", "difference_high"))
    if not svg.finite(gap):
        return [plotted, "" if line["variant"] == FLOAT else "undefined", whole, "", 0]
    whole += f", difference {measure.difference(gap)} {measure.difference_interval(low, high)}".rstrip()
    clear = svg.finite(low, high) and (low > 0 or high < 0)
    side = ("better" if (low > 0) == (better > 0) else "worse") if better and clear else ""
    return [plotted, measure.difference(gap), whole, side, round(100 * abs(gap) / reach) if reach else 0]


def front(costs: Sequence[float | None], values: Sequence[float | None], side: int) -> list[int]:
    """Of points the places of those that none beats: none costs less or as much and is better. side: 1 where more of
    the value is better, -1 where less is. In the order of their cost."""
    pairs = enumerate(zip(costs, values, strict=True))
    known = [(c, -side * v, place) for place, (c, v) in pairs if c is not None and v is not None and svg.finite(c, v)]
    out, best = [], math.inf
    for _, worse, place in sorted(known):
        if worse < best:
            best = worse
            out.append(place)
    return out
