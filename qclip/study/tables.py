"""Tables of what a study measured: each variant beside float, with intervals; as Markdown, CSV or LaTeX.

Everything is read from the store's rows. A value that is undefined is shown as such, with its reason below; a cell that
failed or is missing is named, and no mean is taken over what is left.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qclip.errors import InputError, nearest
from qclip.metrics import METRICS, metric
from qclip.reporting import units

from . import wins
from .cells import CLEAN, Block, Grid
from .rows import TIMED
from .store import StudyStore
from .variants import FLOAT

DEFAULT = ("top1", "ece", "auroc")
SCORE = "mcm"
PLAIN = ("model_bytes", "ms_per_image")  # metrics without a record
COLUMNS = ("model", "evaluation", "variant", "recipe", "method", "bits", "calibration", "seed", "set", "corruption")
COLUMNS += ("severity", "score", "metric", "value", "low", "high", "difference", "difference_low", "difference_high")
COLUMNS += ("n", "reason")
WHERE = ("host", "threads", "seconds")
_READ = ["cell", "runtime", "variant", "evaluation", "calibration", "threads", "model", "recipe", "method", "bits"]
_READ += ["set", "role", "subset", "axis", "at", "corruption", "severity", "score", "metric", "value", "low", "high"]
_READ += ["reference", "n", "seed", "seconds", "host", "reason"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Which numbers a table is of. corruption: None for sets as they are and the means over severities."""

    metrics: tuple[str, ...] = DEFAULT
    score: str = SCORE
    corruption: str | None = None
    where: bool = False  # with host, threads and seconds


@dataclasses.dataclass(frozen=True)
class Printed:
    """A table as text, and what is said below it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Found:
    """The rows of a plan, each absolute value with its difference to float, and what there is not."""

    grid: Grid
    lines: list[dict[str, Any]]
    failed: Mapping[str, Mapping[str, Any]]
    missing: set[str]
    runtimes: list[str]
    notes: list[str]
    runtime: str


def find(grid: Grid, store: StudyStore, asked: Asked = Asked()) -> Found:
    """What the store has of a plan. Of cells that were measured under several runtimes, the rows of the one that has
    most of them are taken, and a note says so. Raises InputError where nothing is there."""
    for name in asked.metrics:
        if name not in METRICS and name not in PLAIN:
            raise InputError(f"unknown metric {name!r}; {nearest(name, METRICS)}")
    cells = grid.cells()
    counts = {runtime: len(store.measured(runtime) & cells) for runtime in _runtimes(store)}
    known = [runtime for runtime, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count]
    if not known:
        raise InputError(f"nothing of {grid.plan.path} is measured in {store.where!r}; use `qclip study run`")
    rows = _chosen(store.rows(cells, _READ), asked)
    lines: list[dict[str, Any]] = []
    left, used = set(cells), []
    for runtime in known:
        there = store.measured(runtime) & left
        if there:
            used.append(runtime)
            left -= there
            mine = pc.and_(pc.equal(rows["runtime"], runtime), pc.is_in(rows["cell"], value_set=pa.array(list(there))))
            lines += _joined(rows.filter(mine).to_pylist())
    failed = {cell: why for runtime in known for cell, why in store.failed(runtime).items() if cell in left}
    order = {cell: place for place, (_, _, cell) in enumerate(grid)}
    lines.sort(key=lambda line: order[line["cell"]])
    return Found(grid, lines, failed, left - failed.keys(), used, _notes(store, used, lines, failed, left), used[0])


def _runtimes(store: StudyStore) -> list[str]:
    return store.measured_under()


def _chosen(rows: pa.Table, asked: Asked) -> pa.Table:
    """The rows of whole sets that a table shows, before they become Python objects."""
    names = {*asked.metrics, *(f"mean_{name}" for name in asked.metrics)}
    keep = pc.is_in(rows["metric"], value_set=pa.array(sorted(names)))
    for column, value in (("subset", "all"), ("axis", "")):
        keep = pc.and_(keep, pc.equal(rows[column], value))
    keep = pc.and_(keep, pc.is_in(rows["score"], value_set=pa.array(["", asked.score])))
    keep = pc.and_(keep, pc.is_in(rows["reference"], value_set=pa.array(["", FLOAT])))
    if asked.corruption is not None:
        keep = pc.and_(keep, pc.equal(rows["corruption"], asked.corruption))
    return rows.filter(keep)


def _joined(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Absolute rows, each with the difference to float."""
    key = ("cell", "set", "corruption", "severity", "score", "metric")
    differences, out = {}, []
    rows = list(rows)
    for row in rows:
        if row["reference"]:
            differences[tuple(row[name] for name in key)] = row
    for row in rows:
        if not row["reference"]:
            other = differences.get(tuple(row[name] for name in key), {})
            row |= {
                "difference": other.get("value"),
                "difference_low": other.get("low"),
                "difference_high": other.get("high"),
            }
            out.append(row)
    return out


def _notes(
    store: StudyStore,
    used: Sequence[str],
    lines: Sequence[Mapping[str, Any]],
    failed: Mapping[str, Any],
    left: set[str],
) -> list[str]:
    notes = []
    if len(used) > 1:
        told = [", ".join(f"{k} {v}" for k, v in sorted(store.runtimes().get(r, {}).items())) for r in used]
        notes.append(
            f"cells were measured under {len(used)} runtimes, and agree to about 1e-5 only: " + "; ".join(told)
        )
    if len(hosts := sorted({line["host"] for line in lines if line["host"]})) > 1:
        notes.append(f"hosts differ: {', '.join(hosts)}")
    for why in dict.fromkeys(f"{each['variant']} on {each['evaluation']}: {each['error']}" for each in failed.values()):
        notes.append(f"failed: {why}")
    if missing := len(left - failed.keys()):
        notes.append(f"{missing} cells are not measured yet")
    return notes


# As text


def printed(found: Found, store: StudyStore, asked: Asked = Asked()) -> list[Printed]:
    """For each model and evaluation: the metrics on every set, the means over severities, and joint wins."""
    out = []
    for model, evaluation in dict.fromkeys((b.variant.model, b.sets.data) for b in found.grid.blocks):
        blocks = [b for b in found.grid.blocks if (b.variant.model, b.sets.data) == (model, evaluation)]
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
            out += _wins(title, blocks, store, asked, found)
        else:
            out += _wide(
                f"{title} under {asked.corruption}",
                blocks,
                lines,
                lambda line: (line["metric"], line["set"], f"severity {line['severity']}" if line["severity"] else ""),
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


def _wins(title: str, blocks: Sequence[Block], store: StudyStore, asked: Asked, found: Found) -> list[Printed]:
    variants = [block for block in blocks if not block.variant.is_float]
    floats = [block for block in blocks if block.variant.is_float]
    tables = {b.variant.label: store.samples(found.runtime, b.cells[CLEAN]) for b in (*floats, *variants)}
    there = [each for each in tables.values() if each is not None]
    if not floats or tables[floats[0].variant.label] is None or len(there) < 2:
        return []
    measured = found.grid.plan.measured
    count = wins.counted(there, asked.score, measured)
    if count is None:
        return []
    row = [str(len(there) - 1), str(count.count), f"{count.expected:.2f}", f"{count.low:.0f} to {count.high:.0f}"]
    row.append(units.probability(count.p) if not math.isnan(count.p) else "undefined")
    columns = ["variants", "win-win-win", "by chance", "95 % of chance", "p"]
    note = (
        f"a win is a better top-1, ECE and AUROC ({asked.score}, mean over OOD sets) than float's; chance is that of "
        f"{measured.replicates} paired resamples in which nothing differs and all correlations stay"
    )
    left = len(variants) - (len(there) - 1)
    notes = [note] + ([f"{left} variants are not in it: nothing was measured of them"] if left else [])
    return [Printed(f"{title}: joint wins", columns, [row], notes)]


def markdown(tables: Sequence[Printed], notes: Sequence[str] = ()) -> str:
    out = []
    for each in tables:
        out += [f"### {each.title}", ""]
        cells = [[_plain(cell) for cell in row] for row in (each.columns, *each.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(each.columns))]
        lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        out += [*lines, ""]
        out += [f"- {note}" for note in each.notes] + ([""] if each.notes else [])
    return "\n".join([*out, *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
_LATEX |= {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", units.MINUS: "$-$", units.ABSENT: "--"}


def latex(tables: Sequence[Printed], notes: Sequence[str] = ()) -> str:
    """`tabular`s, for a table environment of the reader's own."""
    out = []
    for each in tables:
        out += [f"% {each.title}", rf"\begin{{tabular}}{{{'l' * len(each.columns)}}}", r"\hline"]
        for at, row in enumerate((each.columns, *each.rows)):
            out.append(" & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in row) + r" \\")
            out += [r"\hline"] if at == 0 else []
        out += [r"\hline", r"\end{tabular}", *(f"% {note}" for note in each.notes), ""]
    return "\n".join([*out, *(f"% {note}" for note in notes)]).rstrip() + "\n"


def comma_separated(found: Found, asked: Asked = Asked()) -> str:
    """A line per value, in full precision, in the order of the plan: two runs of it are equal text."""
    out = io.StringIO()
    columns = [*COLUMNS, *(WHERE if asked.where else ())]
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for line in found.lines:
        if line["metric"] not in TIMED or asked.where:
            writer.writerow({name: _exact(line[name]) for name in columns})
    return out.getvalue()


def _exact(value: Any) -> Any:
    return "" if value is None else repr(value) if isinstance(value, float) else value
