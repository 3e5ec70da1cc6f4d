"""Runs of a small study on a Ray cluster of which a node is killed (-9) in mid-run: each must end in the table of an
undisturbed run in one process, bit for bit. The cluster is on this machine: a head without processors and two nodes of
one each; which of them is killed, and at which task, differs from run to run. Every second run has its store at a URL
(file://) instead of a folder that the nodes share. Needs the extra `ray`.

    python -m benchmarks.study_ray                # benchmarks/results/study_ray.json
    python -m benchmarks.study_ray --times 2
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from qclip.files import write_atomic
from qclip.machine import cpu_name
from qclip.study.engines.ray_cluster import RayCluster
from qclip.study.formats import comma_separated
from qclip.study.found import find
from qclip.study.measure import Outcome
from qclip.study.plan import Plan
from qclip.study.plan_file import read
from qclip.study.run import engine_of, prepare, run
from qclip.study.store import StudyStore
from qclip.study.tasks import Task
from tests.study.small import Told

RESULT = Path(__file__).parent / "results" / "study_ray.json"
NODE = {"num_cpus": 1, "object_store_memory": 200_000_000}
PLAN = """
models = ["scenes-clean"]
recipes = ["w8a8", "w4a8", "w6a8"]
data = ["scenes:test?samples=60"]
[ood]
far = ["scenes:far-ood?samples=40"]
[corruptions]
names = ["gaussian_noise", "fog"]
severities = [3]
[statistics]
measurements = ["clean", "ood", "corrupted"]
scores = ["mcm"]
replicates = 50
batch = 32
"""


@contextmanager
def cluster() -> Iterator[Any]:
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    made = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0})
    try:
        made.killable = [made.add_node(**NODE) for _ in range(2)]
        made.wait_for_nodes()
        yield made
    finally:
        made.shutdown()


class Killing(Told):
    """Kills a node when so many tasks have ended."""

    def __init__(self, made: Any, node: int, after: int) -> None:
        super().__init__()
        self.made, self.node, self.after, self.killed = made, node, after, False

    def ended(self, task: Task, worker: str, outcome: Outcome) -> None:
        super().ended(task, worker, outcome)
        if len(self.outcomes) == self.after:
            self.made.remove_node(self.made.killable[self.node], allow_graceful=False)
            self.killed = True


def once(plan: Plan, store: str, number: int, expected: str) -> dict[str, Any]:
    with cluster() as made:
        ready = prepare(plan, StudyStore.create(store), threads=1, resident=1, apart=True)
        told = Killing(made, number % 2, 1 + number % 4)
        run(ready, RayCluster(made.address), told)
        return {
            "store": store.partition("://")[0] if "://" in store else "folder",
            "tasks": len(ready.todo),
            "killed_after": told.after if told.killed else None,
            "tasks_begun_again": len(told.began_with) - len({task.key for task in told.began_with}),
            "failed": len(told.failed),
            "equal": comma_separated(find(ready.grid, ready.store)) == expected,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs of a study of which a Ray node is killed.")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        file = Path(folder) / "plan.toml"
        write_atomic(file, PLAN.encode())
        plan = read(file)
        undisturbed = prepare(plan, StudyStore.create(Path(folder) / "undisturbed"), threads=1)
        run(undisturbed, engine_of(1), Told())
        expected = comma_separated(find(undisturbed.grid, undisturbed.store))
        found = []
        for number in range(args.times):
            store = f"{folder}/run-{number}"
            found.append(once(plan, f"file://{store}" if number % 2 else store, number, expected))
            print(f"{number + 1}: {json.dumps(found[-1])}", flush=True)
    equal = sum(each["equal"] and each["killed_after"] is not None and not each["failed"] for each in found)
    about = {"cpu": cpu_name(), "ray": ray.__version__, "runs": len(found), "equal_bit_for_bit": equal}
    write_atomic(args.json, (json.dumps(about | {"each": found}, indent=1) + "\n").encode())
    print(f"{equal} of {len(found)} are equal bit for bit")
    raise SystemExit(equal < len(found))


if __name__ == "__main__":
    main()
