"""What a large study costs before and after its measurements: a plan of 700,000 cells expanded and put into tasks, a
store of a million rows summed up. Without models and images: `qclip study plan` adds a look at each.

    python -m benchmarks.study_scale            # benchmarks/results/study_scale.json
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qclip.files import write_atomic
from qclip.machine import cpu_name
from qclip.study.cells import expand
from qclip.study.facts import Facts
from qclip.study.plan_file import read
from qclip.study.rows import SCHEMA
from qclip.study.run import artifacts
from qclip.study.store import StudyStore
from qclip.study.tasks import Queue, tasks

RESULT = Path(__file__).parent / "results" / "study_scale.json"
ROWS, CELLS = 1_000_000, 40_000
PLAN = """
models = ["a", "b", "c"]
recipes = ["w8a8"]
data = ["scenes:test", "scenes:dev"]
calibration = ["scenes:train"]
seeds = [{seeds}]
[methods]
methods = ["gptq", "awq", "smoothquant", "repq-vit", "svdquant"]
weights = [8, 6, 4, 3, 2]
activations = [8, 6, 4]
[corruptions]
names = ["all"]
"""


def plan_of_many(folder: Path, seeds: int = 67) -> dict[str, Any]:
    file = folder / "plan.toml"
    file.write_text(PLAN.format(seeds=", ".join(map(str, range(seeds)))))
    began = time.perf_counter()
    plan = read(file)
    facts = Facts(
        {name: f"model {name}" for name in "abc"}, {f"scenes:{name}": name for name in ("test", "dev", "train")}, {}
    )
    grid = expand(plan, facts)
    found = tasks(grid, set(), 8, artifacts(grid), apart=True, claims=True)
    queue = Queue(found)
    while (task := queue.take()) is not None:
        queue.finish(task)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cells": len(grid), "tasks": len(found), "seconds": round(seconds, 2), "peak_bytes": peak}


def store_of_many(folder: Path) -> dict[str, Any]:
    store = StudyStore.create(folder / "store")
    draw = np.random.default_rng(0)
    cells = draw.permutation(np.repeat(np.arange(CELLS), ROWS // CELLS))
    texts = {name: pa.array([""]).take(pa.array(np.zeros(ROWS, np.int64))) for name in SCHEMA.names}
    values: dict[str, Any] = {"cell": pa.array([f"{i:032x}" for i in range(CELLS)]).take(pa.array(cells))}
    for name, count in (("variant", 400), ("metric", 40), ("set", 12), ("corruption", 20), ("bits", 12)):
        known = pa.array([f"{name} {i}" for i in range(count)])
        values[name] = known.take(pa.array(draw.integers(0, count, ROWS)))
    values |= {name: pa.array(draw.random(ROWS)) for name in ("value", "low", "high")}
    columns = []
    for field in SCHEMA:
        plain = texts[field.name] if pa.types.is_string(field.type) else pa.nulls(ROWS, field.type)
        columns.append(values.get(field.name, plain))
    name = store.write_many("r", pa.table(columns, schema=SCHEMA))
    path = store.folder / name
    began = time.perf_counter()
    rows = store.rows(columns=["variant", "metric", "value"])
    pivot = rows.group_by(["variant", "metric"]).aggregate([("value", "mean")])
    seconds = time.perf_counter() - began
    out = {"rows": len(rows), "groups": len(pivot), "seconds": round(seconds, 3), "bytes": path.stat().st_size}
    try:
        import duckdb
    except ImportError:
        return out
    began = time.perf_counter()
    asked = f"SELECT variant, metric, avg(value) FROM read_parquet('{path}') GROUP BY 1, 2"
    assert len(duckdb.sql(asked).fetchall()) == len(pivot)
    return out | {"duckdb_seconds": round(time.perf_counter() - began, 3)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {"cpu": cpu_name(), "plan": plan_of_many(Path(folder)), "store": store_of_many(Path(folder))}
    write_atomic(RESULT, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
