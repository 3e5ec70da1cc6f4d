"""What a store has of a plan: absolute values, each beside its difference to float, and what there is not.

Of cells that were measured under several runtimes, the rows of the one that has most of them are taken, and a note says
so. A value that is undefined is NaN, with its reason; cells that failed or are missing are named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qclip.errors import InputError, nearest
from qclip.metrics import METRICS
from qclip.reliability.scores import SCORES

from .cells import Block, Grid, conditions
from .plan import Plan
from .rows import of_cells
from .store import StudyStore
from .variants import FLOAT

DEFAULT = ("top1", "ece", "auroc")
SCORE = "mcm"
MEMORY, LATENCY = "model_bytes", "ms_per_image"
PLAIN = (MEMORY, LATENCY)  # metrics without a record
NAMES = ("model", "variant", "evaluation", "calibration", "recipe")  # of a row, that a plan gives
_READ = ["cell", "runtime", "variant", "evaluation", "calibration", "threads", "model", "recipe", "method", "bits"]
_READ += ["set", "role", "subset", "axis", "at", "corruption", "severity", "score", "metric", "value", "low", "high"]
_READ += ["reference", "n", "seed", "seconds", "host", "reason"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Which numbers a table is of. score: None for MCM or, where the plan does without, its first. corruption: None for
    sets as they are and the means over severities."""

    metrics: tuple[str, ...] = DEFAULT
    score: str | None = None
    corruption: str | None = None
    where: bool = False  # with host, threads and seconds


ALL = Asked()


@dataclasses.dataclass(frozen=True)
class Found:
    """The rows of a plan, each absolute value with its difference to float, and what there is not."""

    grid: Grid
    lines: list[dict[str, Any]]
    failed: Mapping[str, Mapping[str, Any]]
    missing: set[str]
    score: str
    runtimes: list[str]  # those that rows are taken from, most first
    notes: list[str]

    @property
    def runtime(self) -> str:
        """That of most rows."""
        return self.runtimes[0]


def find(grid: Grid, store: StudyStore, asked: Asked = ALL) -> Found:
    """Raises InputError where a metric is unknown, the plan has no such score or corruption, or nothing of it is
    there."""
    for name in asked.metrics:
        if name not in METRICS and name not in PLAIN:
            raise InputError(f"unknown metric {name!r}; {nearest(name, METRICS)}")
    score = score_of(grid.plan, asked.score)
    noise = conditions(grid.plan.measured)[1:]
    if asked.corruption is not None and asked.corruption not in noise:
        raise InputError(f"the plan has no corruption {asked.corruption!r}; {nearest(asked.corruption, noise)}")
    parts = taken(grid, store)
    lines = joined(rows_of(grid, store, parts, _READ, lambda rows: _chosen(rows, asked, score)).to_pylist())
    left = grid.cells().difference(*parts.values())
    blocks = {cell: block for block, _, cell in grid}
    failures = (each for runtime in _runtimes(store) for each in store.failed(runtime).items())
    failed = {cell: {**why, **names(blocks[cell])} for cell, why in failures if cell in left}
    order = {cell: place for place, (_, _, cell) in enumerate(grid)}
    lines.sort(key=lambda line: order[line["cell"]])
    used = list(parts)
    return Found(grid, lines, failed, left - failed.keys(), score, used, _notes(store, used, lines, failed, left))


def score_of(plan: Plan, asked: str | None = None) -> str:
    """The OOD score that is shown. Raises InputError where the plan does not have the one that is asked for."""
    known = SCORES.names() if plan.measured.scores is None else plan.measured.scores
    if asked is None:
        return SCORE if SCORE in known else known[0]
    if asked not in known:
        raise InputError(f"the plan has no score {asked!r}; {nearest(asked, known)}")
    return asked


def names(block: Block) -> dict[str, str | None]:
    """What the rows of a plan's block are called in it; no recipe of float and of artifacts."""
    variant = block.variant
    recipe = None if variant.recipe is None else variant.recipe.name
    calibration = variant.calibration or ""
    return dict(zip(NAMES, (variant.model, variant.label, block.sets.data, calibration, recipe), strict=True))


def taken(grid: Grid, store: StudyStore) -> dict[str, set[str]]:
    """Which cells of a plan are taken from which runtime, most first; each from one. Raises InputError where nothing
    is there."""
    cells = grid.cells()
    there = {runtime: store.measured(runtime) & cells for runtime in _runtimes(store)}
    parts: dict[str, set[str]] = {}
    left = set(cells)
    for runtime in sorted(there, key=lambda name: (-len(there[name]), name)):
        if here := there[runtime] & left:
            parts[runtime] = here
            left -= here
    if not parts:
        raise InputError(f"nothing of {grid.plan.path} is measured in {store.where!r}; use `qclip study run`")
    return parts


def rows_of(
    grid: Grid,
    store: StudyStore,
    parts: Mapping[str, Collection[str]],
    columns: Sequence[str],
    keep: Callable[[pa.Table], pa.Table] = lambda rows: rows,
) -> pa.Table:
    """Rows of a plan's cells, each under the runtime that it is taken from, by the plan's names; `keep` drops rows
    before they are sorted out. columns: "cell" and "runtime" are among them."""
    rows = keep(store.rows({cell for part in parts.values() for cell in part}, columns))
    mine = pa.array([False] * len(rows), pa.bool_())
    for runtime, cells in parts.items():
        mine = pc.or_(mine, pc.and_(pc.equal(rows["runtime"], runtime), of_cells(rows, cells)))
    return _named(grid, rows.filter(mine))


def _named(grid: Grid, rows: pa.Table) -> pa.Table:
    """Another plan may have measured a cell under other names of its model, recipe and sets."""
    cells = pc.cast(rows["cell"], pa.string()).combine_chunks().dictionary_encode()
    blocks = {cell: block for block, _, cell in grid}
    here = [blocks[cell] for cell in cells.dictionary.to_pylist()]
    for column in set(NAMES) & set(rows.column_names):
        own = pa.array([names(block)[column] for block in here], pa.string()).take(cells.indices)
        said = pc.cast(rows[column], pa.string())
        if column == "recipe":  # what float is, and an artifact, a recipe's name says in the rows alone
            own = pc.coalesce(own, said)
        rows = rows.set_column(rows.column_names.index(column), column, own.dictionary_encode())
    return rows


def _runtimes(store: StudyStore) -> list[str]:
    return sorted({*store.measured_under(), *store.files.children("failures")})


def _chosen(rows: pa.Table, asked: Asked, score: str) -> pa.Table:
    """The rows of whole sets that a table shows, before they become Python objects."""
    names = {*asked.metrics, *(f"mean_{name}" for name in asked.metrics)}
    keep = pc.is_in(rows["metric"], value_set=pa.array(sorted(names)))
    for column, value in (("subset", "all"), ("axis", "")):
        keep = pc.and_(keep, pc.equal(rows[column], value))
    keep = pc.and_(keep, pc.is_in(rows["score"], value_set=pa.array(["", score])))
    keep = pc.and_(keep, pc.is_in(rows["reference"], value_set=pa.array(["", FLOAT])))
    if asked.corruption is not None:
        keep = pc.and_(keep, pc.equal(rows["corruption"], asked.corruption))
    return rows.filter(keep)


def joined(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Absolute rows, each with the difference to float. Of rows of whole sets: neither subsets nor axes tell them
    apart."""
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
