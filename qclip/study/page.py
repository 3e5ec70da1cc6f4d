"""The page of a study: for a metric and place of the reader's choice heat maps of method by bits, model beside model,
and size or time against the metric; behind every variant its reliability page. Files in a folder; no network."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qclip import files
from qclip.reporting import html
from qclip.results import Results

from .cells import Block, Grid
from .found import ALL, LATENCY, MEMORY, Asked, Found, find
from .rows import results_row
from .sizes import sizes
from .store import StudyStore
from .views import views

FILE = "index.html"
# Between which the page switches; under corruptions the means over severities of those that have one.
METRICS = ("top1", "ece", "nll", "brier", "signed_gap", "auroc", "fpr95", "aurc", "worst_group_top1", "group_gap")
DEFAULT = dataclasses.replace(ALL, metrics=METRICS)


def check_output(folder: Path, force: bool = False) -> None:
    files.check_folder(folder, (FILE,), force)


def write(grid: Grid, store: StudyStore, folder: Path, asked: Asked = DEFAULT, pages: bool = True) -> tuple[Path, int]:
    """Write the page, and with `pages` that of each variant beside it: the folder, and how many pages there are. Raises
    InputError where nothing was measured, OutputError where the folder cannot be written."""
    found = find(grid, store, dataclasses.replace(asked, metrics=(*asked.metrics, MEMORY, LATENCY)))
    names = {id(block): f"{next(iter(block.cells.values()))}.html" for block in grid.blocks}
    with files.whole_folder(folder, last=FILE) as part:
        written: dict[int, str] = {}
        for block in grid.blocks if pages else ():
            results = variant_results(grid, store, block, found.runtime)
            if results is not None:
                (part / names[id(block)]).write_text(html(results), encoding="utf-8", errors="replace")
                written[id(block)] = names[id(block)]
        text = index(found, views(found, asked.metrics, sizes(grid, store), written))
        (part / FILE).write_text(text, encoding="utf-8", errors="replace")
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
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in store.rows(cells, runtime=runtime).to_pylist():
        rows.setdefault(row["cell"], []).append(row)
    if not any(cell in rows for cell in block.cells.values()):
        return None
    parts = []
    for each in both:
        parts += [
            _cell_results(each, rows[cell], store.details(runtime, cell))
            for cell in each.cells.values()
            if cell in rows
        ]
    return Results.merge(*parts)


def _cell_results(block: Block, rows: list[dict[str, Any]], details: str | None) -> Results:
    """Of one cell, under the plan's name for its variant: another plan may have measured it under its own."""
    label, before = block.variant.label, rows[0]["variant"]
    body = {"notes": [], "meta": {}, "curves": []} if details is None else json.loads(details)
    notes = [
        f"{label}: {note.removeprefix(f'{before}: ')}" if note.startswith(f"{before}: ") else note
        for note in body["notes"]
    ]
    if before in (models := body["meta"].get("models", {})):
        models[label] = models.pop(before)
    curves = [curve | {"model": label} if curve["model"] == before else curve for curve in body["curves"]]
    return Results([results_row(row | {"variant": label}) for row in rows], notes, body["meta"], curves)


def index(found: Found, shown: dict[str, Any]) -> str:
    """The page itself, of what `views` gives."""
    measured = len(found.grid) - len(found.missing) - len(found.failed)
    lead = f"{measured} of {len(found.grid)} cells were measured"
    lead += f", {len(found.failed)} failed" if found.failed else ""
    linked = any(variant["page"] for part in shown["parts"] for variant in part["variants"])
    body = json.dumps(shown, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    data = Markup(body.replace("<", "\\u003c"))  # nothing in it ends the script that it stands in
    title = Path(found.grid.plan.path).stem
    return _template().render(title=title, lead=lead, notes=found.notes, linked=linked, data=data)


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
