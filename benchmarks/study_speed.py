"""What a study saves, and what it costs: whole commands, timed one after the other while the machine does nothing else.

    python -m benchmarks.study_speed --data DIR          # DIR: cifar10_test.parquet; writes results/study_speed.json
    python -m benchmarks.study_speed --data DIR --only workers --samples 500

`evaluate`: 20 variants of `photos` on CIFAR-10's test and 15 corruptions, as one study and as separate `qclip evaluate`
calls, of which some are timed and the rest counted as these. Both read the same artifacts and begin without embeddings;
calls find the float model's in the cache from the second on, and `times_faster_without_cache` is where they do not, as
on one machine each. The study runs in one process with all threads, and in as many of one thread each. The overhead
of the one process is what its wall time has beyond the stages that compute.
`workers`: one process with one thread, two with one thread each, and a Ray cluster of two workers with one thread each
(where `ray` is installed), the same plan each time; quantizing is part of it.
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
data = ["parquet:{data}/cifar10_test.parquet{samples}"]
{more}
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


def variants(folder: Path, threads: int) -> list[Path]:
    """Twenty artifacts of `photos`."""
    found = []
    for number, grid in enumerate(VARIANTS):
        file = folder / f"variant{number}.json"
        file.write_text(json.dumps({"name": file.stem, "activation_bits": 8, **grid}))
        found.append(folder / file.stem)
        command("quantize", "photos", "--recipe", file, "--output", found[-1], cache=folder / "cache", threads=threads)
    return found


def against_evaluate(folder: Path, data: str, samples: str, timed: int, threads: int) -> dict[str, Any]:
    made = variants(folder, threads)
    plan = folder / "twenty.toml"
    listed = ", ".join(json.dumps(str(each)) for each in made)
    plan.write_text(PLAN.format(data=data, samples=samples, more=f"[artifacts]\nphotos = [{listed}]"))
    whole = study(plan, folder / "store", threads)
    shared = study(plan, folder / "store of workers", 1, "--workers", threads)["wall"] if threads > 1 else whole["wall"]
    named = ("--data", f"parquet:{data}/cifar10_test.parquet{samples}", "--corruption", "imagenet-c", "--severity", 3)
    asked = (*named, "--measure", "clean", "--measure", "corrupted")
    each = [
        command("evaluate", "photos", path, *asked, cache=folder / "cache-evaluate", threads=threads)
        for path in made[:: len(made) // timed][:timed]
    ]
    separate = each[0] + statistics.median(each[1:]) * (len(made) - 1)  # the first embeds the float model, too
    stages = sum(seconds for name, seconds in whole["seconds"].items() if name != "keep")
    return {
        "variants": len(made),
        "study_seconds": round(whole["wall"], 1),
        "evaluate_seconds_each": [round(seconds, 1) for seconds in each],
        "evaluate_seconds_all": round(separate, 1),
        "times_faster": round(separate / whole["wall"], 2),
        "times_faster_without_cache": round(each[0] * len(made) / whole["wall"], 2),
        "study_seconds_of_workers": round(shared, 1),
        "times_faster_of_workers": round(separate / shared, 2),
        "stage_seconds": {name: round(seconds, 2) for name, seconds in whole["seconds"].items()},
        "run_seconds": round(whole["elapsed"], 2),
        "overhead_of_run": round(whole["elapsed"] / stages - 1, 4),
        "overhead_of_command": round(whole["wall"] / stages - 1, 4),
    }


def workers(folder: Path, data: str, samples: str, turns: int) -> dict[str, Any]:
    plan = folder / "seven.toml"
    more = '[methods]\nmethods = ["rtn"]\nweights = [8, 7, 6, 5, 4, 3, 2]\nactivations = [8]'
    plan.write_text(PLAN.format(data=data, samples=samples, more=more))
    ways: dict[str, tuple[object, ...]] = {"one process": (), "two processes": ("--workers", 2)}
    walls: dict[str, list[float]] = {}
    tables: dict[str, str] = {}
    with cluster() as address:
        if address:
            ways["Ray, two workers"] = ("--ray", address)
        for _ in range(turns):
            for name, options in ways.items():
                store = folder / f"store of {name}"
                found = study(plan, store, 1, *options)
                walls.setdefault(name, []).append(found["wall"])
                command("study", "table", plan, "--store", store, "--format", "csv", cache=folder / "cache", threads=1)
                tables[name] = command.said  # type: ignore[attr-defined]
    first = tables["one process"]
    middle = {name: statistics.median(each) for name, each in walls.items()}
    return {
        "seconds": {name: [round(seconds, 1) for seconds in each] for name, each in walls.items()},
        "times_faster": {name: round(middle["one process"] / each, 2) for name, each in middle.items()},
        "tables_equal": all(each == first for each in tables.values()),
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
    parser.add_argument("--only", choices=["evaluate", "workers"])
    parser.add_argument("--samples", type=int, help="images of the labelled set; default: all, and 2,000 of `workers`")
    parser.add_argument("--timed", type=int, default=5, help="`evaluate` calls that are timed")
    parser.add_argument("--turns", type=int, default=1)
    args = parser.parse_args()
    data, threads = str(Path(args.data).resolve()), torch.get_num_threads()
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    found |= {"cpu": cpu_name(), "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "workers":
            some = f"?samples={args.samples}" if args.samples else ""
            measured = against_evaluate(Path(folder), data, some, args.timed, threads)
            found["evaluate"] = {"labelled_images": args.samples or "all"} | measured
            print(json.dumps(found["evaluate"], indent=1), flush=True)
        if args.only != "evaluate":
            samples = args.samples or 2000
            measured = workers(Path(folder), data, f"?samples={samples}", args.turns)
            found["workers"] = {"labelled_images": samples} | measured
            print(json.dumps(found["workers"], indent=1), flush=True)
    write_atomic(RESULT, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
