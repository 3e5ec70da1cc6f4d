"""What a study saves, and what it costs: whole commands, timed one after the other while the machine does nothing else.

    python -m benchmarks.study_speed --data DIR          # DIR: cifar10_test.parquet; writes results/study_speed.json
    python -m benchmarks.study_speed --data DIR --variants 3 --samples 300 --only study

20 variants of `photos` on CIFAR-10's test and 15 corruptions. `study`: in one process with one thread, in two with one
thread each, and on a Ray cluster of two workers with one thread each (where `ray` is installed), the same plan, begun
without embeddings. `throughput` is images a second while it is measured, imports and looking at the plan aside; the
overhead of the one process is what its time has beyond the stages that compute.
`evaluate`: the same as separate `qclip evaluate` calls with all threads, of which some are timed and the rest counted
as these; all read the same artifacts. Calls find the float model's embeddings in the cache from the second on, and
`without_cache` is where they do not, as on one machine each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import qclip
from qclip import recipes
from qclip.files import write_atomic
from qclip.machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "study_speed.json"
#: Twenty recipes that run on kernels: widths a channel, groups, and HQQ.
VARIANTS: list[dict[str, Any]] = [{"weight_bits": bits} for bits in (8, 6, 5, 4, 3, 2)]
VARIANTS += [{"weight_bits": bits, "group": group} for bits in (4, 3, 2) for group in (32, 64, 128)]
VARIANTS += [{"weight_bits": bits, "steps": ["hqq"]} for bits in (4, 3, 2)]
VARIANTS += [{"weight_bits": bits, "group": 64, "steps": ["hqq"]} for bits in (4, 3)]
PLAN = """
models = ["photos"]
recipes = []
data = ["{data}"]
[artifacts]
photos = [{artifacts}]
[corruptions]
names = ["imagenet-c"]
severities = [3]
[statistics]
measurements = ["clean", "corrupted"]
"""


def command(*arguments: object, cache: Path, threads: int) -> float:
    """Seconds of a `qclip` command. Its output is shown where it fails."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)} | dict.fromkeys(names, str(threads))
    began = time.perf_counter()
    line = [sys.executable, "-m", "qclip", *map(str, arguments)]
    found = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{' '.join(line)}\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}")
    command.said = found.stdout  # type: ignore[attr-defined]
    return time.perf_counter() - began


def study(plan: Path, store: Path, threads: int, *more: object) -> dict[str, Any]:
    """A run from an empty store: `wall` seconds of the command, and what it says of itself."""
    shutil.rmtree(store, ignore_errors=True)
    arguments = ("study", "run", plan, "--store", store, "--threads", threads, "--json", *more)
    wall = command(*arguments, cache=store.with_suffix(".cache"), threads=threads)
    return {"wall": wall} | json.loads(command.said)  # type: ignore[attr-defined]


def variants(folder: Path, count: int) -> list[Path]:
    """Artifacts of `photos`."""
    base = qclip.load_model("photos")
    found = []
    for number, grid in enumerate(VARIANTS[:count]):
        recipe = recipes.Recipe.from_dict({"name": f"variant{number}", "activation_bits": 8, **grid})
        found.append(qclip.save(qclip.quantize(base, recipe), folder / recipe.name))
    return found


def studies(folder: Path, made: list[Path], data: str, turns: int) -> dict[str, Any]:
    plan = folder / "plan.toml"
    plan.write_text(PLAN.format(data=data, artifacts=", ".join(json.dumps(str(each)) for each in made)))
    ways: dict[str, tuple[object, ...]] = {"one process": (), "two processes": ("--workers", 2)}
    runs: dict[str, list[dict[str, Any]]] = {}
    tables: dict[str, str] = {}
    with cluster() as address:
        if address:
            ways["Ray, two workers"] = ("--ray", address)
        for _ in range(turns):
            for name, options in ways.items():
                store = folder / f"store of {name}"
                runs.setdefault(name, []).append(study(plan, store, 1, *options))
                command("study", "table", plan, "--store", store, "--format", "csv", cache=folder / "cache", threads=1)
                tables[name] = command.said  # type: ignore[attr-defined]
                print(name, runs[name][-1], flush=True)
    one = statistics.median(each["wall"] for each in runs["one process"])
    inside = statistics.median(each["elapsed"] for each in runs["one process"])
    stages = runs["one process"][0]["seconds"]
    computing = sum(seconds for name, seconds in stages.items() if name != "keep")
    return {
        "seconds": {name: [round(each["wall"], 1) for each in found] for name, found in runs.items()},
        "times_faster": {n: round(one / statistics.median(e["wall"] for e in f), 2) for n, f in runs.items()},
        "throughput": {n: round(inside / statistics.median(e["elapsed"] for e in f), 2) for n, f in runs.items()},
        "tables_equal": len(set(tables.values())) == 1,
        "stage_seconds": {name: round(seconds, 2) for name, seconds in stages.items()},
        "overhead_of_run": round(runs["one process"][0]["elapsed"] / computing - 1, 4),
        "overhead_of_command": round(runs["one process"][0]["wall"] / computing - 1, 4),
    }


def evaluations(folder: Path, made: list[Path], data: str, timed: int, threads: int) -> dict[str, Any]:
    asked = (
        "--data",
        data,
        "--corruption",
        "imagenet-c",
        "--severity",
        3,
        "--measure",
        "clean",
        "--measure",
        "corrupted",
    )
    each = [
        command("evaluate", "photos", path, *asked, cache=folder / "cache-evaluate", threads=threads)
        for path in made[:: max(1, len(made) // timed)][:timed]
    ]
    separate = each[0] + statistics.median(each[1:] or each) * (len(made) - 1)  # the first embeds the float model, too
    return {
        "threads": threads,
        "seconds_each": [round(seconds, 1) for seconds in each],
        "seconds_all": round(separate, 1),
        "seconds_all_without_cache": round(each[0] * len(made), 1),
    }


@contextlib.contextmanager
def cluster() -> Iterator[str | None]:
    """A head that does no work and two nodes of one processor, on this machine; None without `ray`."""
    try:
        from ray.cluster_utils import Cluster
    except ImportError:
        yield None
        return
    os.environ["PYTHONPATH"] = str(ROOT)
    sizes = {"object_store_memory": 200_000_000}
    made = Cluster(initialize_head=True, head_node_args=sizes | {"num_cpus": 0})
    for _ in range(2):
        made.add_node(num_cpus=1, **sizes)
    made.wait_for_nodes()
    try:
        yield made.address
    finally:
        made.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of cifar10_test.parquet")
    parser.add_argument("--only", choices=["study", "evaluate"])
    parser.add_argument("--variants", type=int, default=len(VARIANTS))
    parser.add_argument("--samples", type=int, default=2000, help="images of the labelled set")
    parser.add_argument("--timed", type=int, default=4, help="`evaluate` calls that are timed")
    parser.add_argument("--turns", type=int, default=1)
    args = parser.parse_args()
    data = f"parquet:{Path(args.data).resolve()}/cifar10_test.parquet?samples={args.samples}"
    found: dict[str, Any] = {"cpu": cpu_name(), "labelled_images": args.samples, "variants": args.variants}
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if found.items() <= kept.items():
        found = kept
    with tempfile.TemporaryDirectory() as folder:
        made = variants(Path(folder), args.variants)
        if args.only != "evaluate":
            found["study"] = studies(Path(folder), made, data, args.turns)
        if args.only != "study":
            found["evaluate"] = evaluations(Path(folder), made, data, args.timed, torch.get_num_threads())
    if "study" in found and "evaluate" in found:
        both = found["evaluate"]["seconds_all"], found["evaluate"]["seconds_all_without_cache"]
        walls = {name: statistics.median(each) for name, each in found["study"]["seconds"].items()}
        for name, seconds in zip(("times_faster", "times_faster_without_cache"), both, strict=True):
            found["evaluate"][name] = {way: round(seconds / wall, 2) for way, wall in walls.items()}
    print(json.dumps(found, indent=1), flush=True)
    write_atomic(RESULT, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
