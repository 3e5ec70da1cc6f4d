"""The page of a study: a heat map of method by bits for each metric, size against each metric, model by model, and
behind every variant its reliability page. Files in a folder; no network, no script."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qclip import files
from qclip.metrics import metric
from qclip.reporting import html, svg, units
from qclip.reporting.parts import Figure
from qclip.results import Results

from .cells import Block, Grid
from .choose import LATENCY, SIZE
from .rows import results_row
from .store import StudyStore
from .tables import Asked, Found, find
from .variants import FLOAT

FILE = "index.html"
ALL = Asked()
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shade:
    """One variant in a heat map. side: "better" or "worse" where its interval is clear of 0; much: 0..100."""

    text: str
    variant: str
    whole: str
    page: str
    side: str = ""
    much: int = 0


@dataclasses.dataclass(frozen=True)
class Heat:
    title: str
    columns: list[str]
    rows: list[tuple[str, list[list[Shade]]]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One model on one evaluation."""

    anchor: str
    title: str
    heats: list[Heat]
    pareto: list[Figure]
    legend: list[tuple[Markup, str]]  # of its marks: methods


def check_output(folder: Path, force: bool = False) -> None:
    files.check_folder(folder, (FILE,), force)


def write(grid: Grid, store: StudyStore, folder: Path, asked: Asked = ALL, pages: bool = True) -> tuple[Path, int]:
    """Write the page, and with `pages` that of each variant beside it: the folder, and how many pages there are. Raises
    InputError where nothing was measured, OutputError where the folder cannot be written."""
    found = find(grid, store, dataclasses.replace(asked, metrics=(*asked.metrics, SIZE, LATENCY)))
    names = {id(block): f"{cell}.html" for block in grid.blocks for cell in [next(iter(block.cells.values()))]}
    with files.whole_folder(folder, last=FILE) as part:
        written: set[str] = set()
        for block in grid.blocks if pages else ():
            results = variant_results(grid, store, block, found.runtime)
            if results is not None:
                (part / names[id(block)]).write_text(html(results), encoding="utf-8", errors="replace")
                written.add(names[id(block)])
        (part / FILE).write_text(_index(found, asked, names, written), encoding="utf-8", errors="replace")
    return folder, len(written)


def variant_results(grid: Grid, store: StudyStore, block: Block, runtime: str) -> Results | None:
    """What `qclip.evaluate` gives of float and this variant: rows, curves and notes of all its cells. None where
    nothing of it was measured under that runtime."""
    both = [
        each
        for each in grid.blocks
        if (each.variant.model, each.sets) == (block.variant.model, block.sets)
        and (each.variant.is_float or each is block)
    ]
    cells = {cell for each in both for cell in each.cells.values()}
    rows: dict[str, list[Line]] = {}
    for row in store.rows(cells, runtime=runtime).to_pylist():
        rows.setdefault(row["cell"], []).append(row)
    if not any(cell in rows for cell in block.cells.values()):
        return None
    parts = []
    for cell in (cell for each in both for cell in each.cells.values() if cell in rows):
        details = store.details(runtime, cell)
        body = {"notes": [], "meta": {}, "curves": []} if details is None else json.loads(details)
        mine = [results_row(row) for row in rows[cell]]
        parts.append(Results(mine, body["notes"], body["meta"], body["curves"]))
    return Results.merge(*parts)


def _index(found: Found, asked: Asked, names: dict[int, str], written: set[str]) -> str:
    parts = []
    blocks = found.grid.blocks
    for at, (model, evaluation) in enumerate(dict.fromkeys((b.variant.model, b.sets.data) for b in blocks)):
        mine = [block for block in blocks if (block.variant.model, block.sets.data) == (model, evaluation)]
        lines = [line for line in found.lines if (line["model"], line["evaluation"]) == (model, evaluation)]
        pages = {block.variant.label: name for block in mine if (name := names[id(block)]) in written}
        places = dict.fromkeys((line["metric"], line["set"]) for line in lines if _shown(line, asked))
        heats = [heat for place in places if (heat := _heat(place, mine, lines, pages))]
        methods = list(dict.fromkeys(line["method"] or line["recipe"] for line in lines))
        pareto = [figure for place in places if (figure := _pareto(model, place, lines, methods))]
        legend = [(svg.key(series), name or FLOAT) for series, name in enumerate(methods)]
        parts.append(Part(f"part-{at}", f"{model} on {evaluation}", heats, pareto, legend))
    measured = len(found.grid) - len(found.missing) - len(found.failed)
    lead = f"{measured} of {len(found.grid)} cells were measured" + (
        f", {len(found.failed)} failed" if found.failed else ""
    )
    title = Path(found.grid.plan.path).stem
    return _template().render(title=title, lead=lead, parts=parts, notes=found.notes, linked=bool(written))


def _template() -> jinja2.Template:
    return jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader("qclip.study", "templates"), jinja2.PackageLoader("qclip.reporting", "templates")]
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("study.html.j2")


def _shown(line: Line, asked: Asked) -> bool:
    return line["metric"] in asked.metrics and not line["corruption"]


def _heat(place: tuple[str, str], blocks: Sequence[Block], lines: Sequence[Line], pages: dict[str, str]) -> Heat | None:
    """Differences of a metric on a set: a row per method, a column per bits, in the order of the plan."""
    name, of = place
    here = {
        line["variant"]: line for line in lines if (line["metric"], line["set"]) == place and not line["corruption"]
    }
    variants = [b.variant for b in blocks if not b.variant.is_float and b.variant.label in here]
    if not variants:
        return None
    gaps = [abs(here[each.label]["difference"] or 0.0) for each in variants]
    reach = max((gap for gap in gaps if not math.isnan(gap)), default=0.0)
    table: dict[str, dict[str, list[Shade]]] = {}
    columns: dict[str, None] = {}
    for variant in variants:
        line = here[variant.label]
        bits = line["bits"] or "artifact"
        columns[bits] = None
        shade = _shade(line, reach, pages.get(variant.label, ""))
        table.setdefault(line["method"] or variant.label, {}).setdefault(bits, []).append(shade)
    rows = [(method, [row.get(bits, []) for bits in columns]) for method, row in table.items()]
    return Heat(f"{metric(name).label} on {of}", list(columns), rows)


def _shade(line: Line, reach: float, page: str) -> Shade:
    measure = units.metric(line["metric"])
    gap, low, high = (line[name] for name in ("difference", "difference_low", "difference_high"))
    if gap is None or math.isnan(gap):
        return Shade("undefined", line["variant"], line["reason"] or "no difference is defined", page)
    whole = f"{line['variant']}: {measure.value(None if math.isnan(line['value']) else line['value'])}, difference "
    whole += f"{measure.difference(gap)} {measure.difference_interval(low, high)}".strip()
    side, better = "", metric(line["metric"]).better
    if better and svg.finite(low, high) and (low > 0 or high < 0):
        side = "better" if (low > 0) == (better > 0) else "worse"
    return Shade(
        measure.difference(gap), line["variant"], whole, page, side, round(100 * abs(gap) / reach) if reach else 0
    )


def _pareto(model: str, place: tuple[str, str], lines: Sequence[Line], methods: list[str]) -> Figure | None:
    """Size against a metric; a series per method."""
    name, of = place
    sizes = {line["variant"]: line["value"] / 1e6 for line in lines if line["metric"] == SIZE}
    measure, scale = units.metric(name), 100 if metric(name).unit == "share" else 1
    points = [
        (sizes[line["variant"]], scale * line["value"], line)
        for line in lines
        if (line["metric"], line["set"]) == place and not line["corruption"] and line["variant"] in sizes
    ]
    points = [point for point in points if svg.finite(point[1])]
    if len(points) < 2:
        return None
    side = metric(name).better or 1
    x = svg.padded([point[0] for point in points], floor=0)
    y = svg.padded([point[1] for point in points])
    label = measure.name + (" (%)" if measure.share else "")
    title = f"{measure.name} on {of}"
    described = f"Size in MB of {len(points)} variants of {model}, and {measure.name} on {of}."
    axes = svg.Axes(title, described, x, y, x_label="size (MB)", y_label=label)
    floats = [point for point in points if point[2]["variant"] == FLOAT]
    if floats:
        axes.guide((x[0], floats[0][1]), (x[1], floats[0][1]))
    front, best = [], -math.inf
    for size, value, _ in sorted(points, key=lambda point: (point[0], -side * point[1])):
        if side * value > best:
            best = side * value
            front.append((size, value))
    axes.line(front, 1)
    for size, value, line in points:
        tip = f"{line['variant']}: {size:.1f} MB, {measure.value(value / scale)}"
        axes.mark(size, value, methods.index(line["method"] or line["recipe"]), tip)
    return Figure(title, axes.render())
