"""The published study: measured, kept as a small Parquet file, and docs/study.md told from that.

    python -m benchmarks.study run                # benchmarks/studies/published.toml, about an hour on two cores
    python -m benchmarks.study keep STORE         # what of a store the page reads, where `qclip study run` filled it
    python -m benchmarks.study write              # docs/study.md from benchmarks/results/study

`run` estimates what is left to be measured, measures it, and keeps it. Killed, it goes on when it is started again;
what runs took that came to their end is noted in published.json. Start it in the repository's root: the plan names
sets from there. Nothing in the page is typed: every sentence follows from rows and intervals.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qclip.files import write_atomic
from qclip.machine import cpu_name
from qclip.study.cells import Grid
from qclip.study.correlations import MEASURES
from qclip.study.estimate import estimate
from qclip.study.found import rows_of, taken
from qclip.study.plan import Plan
from qclip.study.plan_file import read
from qclip.study.progress import Counts
from qclip.study.rows import SCHEMA, TEXTS, VOLATILE
from qclip.study.run import engine_of, prepare, recall, run
from qclip.study.store import StudyStore
from qclip.study.variants import FLOAT
from qclip.study.wins import joint

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results" / "study"
PAGE = ROOT / "docs" / "study.md"
PLAN = ROOT / "benchmarks" / "studies" / "published.toml"
STORE = ROOT / "runs" / "published.study"
#: Of whole sets, absolute and beside float; under corruptions the means over severities alone.
METRICS = ("top1", "ece", "nll", "signed_gap", "auroc", "worst_group_top1", "group_gap", "mean_top1", "mean_ece")
SPECTRA = (*MEASURES, "gain", "sqnr")  # of towers, beside their controls
WINS = ("wins", "wins_expected", "wins_p")


def kept(grid: Grid, store: StudyStore) -> pa.Table:
    """The rows that the page reads, without host and time, and those of joint wins, for which the store has images and
    no rows."""
    parts = taken(grid, store)
    rows = rows_of(grid, store, parts, SCHEMA.names, _read)
    won = pa.Table.from_pylist(list(_wins(grid, store, next(iter(parts)))), SCHEMA)
    plain = pa.schema([pa.field(f.name, pa.dictionary(pa.int32(), f.type)) if f.name in TEXTS else f for f in SCHEMA])
    both = pa.concat_tables([rows.cast(plain), won.cast(plain)]).unify_dictionaries()
    order = {cell: place for place, (_, _, cell) in enumerate(grid)}
    places = pa.array([order.get(cell, len(order)) for cell in both["cell"].to_pylist()])
    both = both.append_column("place", places)
    keys = ["place", "set", "corruption", "score", "metric", "reference", "axis", "at", "subset"]
    text = pa.table({name: pc.cast(both[name], pa.string()) if name != "place" else both[name] for name in keys})
    ordered = both.take(pc.sort_indices(text, sort_keys=[(name, "ascending") for name in keys]))
    return ordered.drop_columns(["place", *VOLATILE])


def _read(rows: pa.Table) -> pa.Table:
    def among(column: str, values: tuple[str, ...]) -> Any:
        return pc.is_in(rows[column], value_set=pa.array(values, pa.string()))

    whole = pc.and_(among("subset", ("all",)), among("axis", ("",)))
    where = pc.or_(among("corruption", ("",)), among("metric", ("mean_top1", "mean_ece")))
    plain = pc.and_(pc.and_(whole, where), pc.and_(among("metric", METRICS), among("reference", ("", FLOAT))))
    tower = pc.and_(among("role", ("tower",)), pc.and_(among("metric", SPECTRA), among("axis", ("", "band"))))
    return rows.filter(pc.or_(plain, tower))


def _wins(grid: Grid, store: StudyStore, runtime: str) -> Any:
    scores = store.rows(columns=["score"])["score"]
    for (model, evaluation), blocks in grid.evaluations().items():
        for score in sorted(filter(None, pc.unique(scores).to_pylist())):
            found = joint(blocks, store, runtime, score, grid.plan.measured)
            if found is None:
                continue
            wins, n = found
            ends = {"wins_expected": (wins.expected, wins.low, wins.high)}
            for name, value in zip(WINS, (wins.count, wins.expected, wins.p), strict=True):
                _, low, high = ends.get(name, (value, None, None))
                row = dict.fromkeys(SCHEMA.names, "") | dict.fromkeys(_numbers())
                row |= {"model": model, "evaluation": evaluation, "score": score, "metric": name, "subset": "all"}
                yield row | {"reference": FLOAT, "n": n, "value": float(value), "low": low, "high": high}


def _numbers() -> list[str]:
    return [field.name for field in SCHEMA if field.name not in TEXTS] + ["at"]


def keep(grid: Grid, store: StudyStore, folder: Path = FOLDER) -> Path:
    """Write `published.parquet`, and into `published.json` how large the plan is."""
    _note(folder, grid)
    rows = kept(grid, store)
    out = pa.BufferOutputStream()
    pq.write_table(rows, out, compression="zstd", compression_level=19, use_dictionary=True)
    path = write_atomic(folder / "published.parquet", out.getvalue().to_pybytes())
    print(f"{path}: {len(rows)} rows, {path.stat().st_size} bytes")
    return path


def _note(folder: Path, grid: Grid, run: dict[str, Any] | None = None) -> None:
    """The record beside the rows: the plan's size, and what each run of it took."""
    record = folder / "published.json"
    known = json.loads(record.read_text()) if record.exists() else {"runs": []}
    variants = {(block.variant.model, block.variant.label) for block in grid.blocks}
    known |= {"plan": Path(grid.plan.path).name, "cells": len(grid), "variants": len(variants)}
    known["runs"] += [run] if run else []
    write_atomic(record, (json.dumps(known, indent=1) + "\n").encode())


def measure(plan: Plan, store: StudyStore, threads: int | None, workers: int, folder: Path = FOLDER) -> Grid:
    """Run a plan, and note what it took; the first line of what is said is the estimate."""
    ready = prepare(plan, store, threads, workers, progress=print)
    if not ready.todo:
        return ready.grid
    expected = estimate(ready, workers, probe=True)
    print(f"{sum(len(task.cells) for task in ready.todo)} cells, estimated {expected['seconds']:.0f} s", flush=True)
    counts = Counts(len(ready.grid), len(ready.cached), len(ready.failed), store, plan.path)
    began = time.perf_counter()
    with counts.shown():
        run(ready, engine_of(workers), counts)
    done = {
        "cpu": cpu_name(),
        "threads": ready.work.threads,
        "workers": workers,
        "cells": counts.done,
        "failed": counts.failed,
        "images": expected["images"],
        "estimated_seconds": round(expected["seconds"], 1),
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_by_stage": {stage: round(seconds, 1) for stage, seconds in counts.seconds.items()},
    }
    _note(folder, ready.grid, done)
    return ready.grid


def results(folder: Path = FOLDER) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that were kept, and the record of their runs."""
    rows = pq.read_table(folder / "published.parquet").to_pylist()
    record = folder / "published.json"
    return rows, json.loads(record.read_text()) if record.exists() else {"runs": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest="what", required=True)
    one = sub.add_parser("run")
    one.add_argument("--store", type=Path, default=STORE)
    one.add_argument("--threads", type=int, help="of each worker; default: the machine's, divided")
    one.add_argument("--workers", type=int, default=1)
    other = sub.add_parser("keep")
    other.add_argument("store", type=Path)
    for each in (one, other):
        each.add_argument("--plan", type=Path, default=PLAN)
        each.add_argument("--results", type=Path, default=FOLDER, help="folder of published.parquet and .json")
    last = sub.add_parser("write")
    last.add_argument("--results", type=Path, default=FOLDER)
    last.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    if args.what == "write":
        from .study_page import page

        write_atomic(args.page, page(*results(args.results)).encode())
        return
    plan = read(args.plan)
    if args.what == "run":
        store = StudyStore.create(args.store)
        keep(measure(plan, store, args.threads, args.workers, args.results), store, args.results)
    else:
        store = StudyStore.open(args.store)
        keep(recall(plan, store), store, args.results)


if __name__ == "__main__":
    main()
