"""A Ray cluster gives the numbers of one process, whatever happens to its nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qclip.errors import InputError
from qclip.study.engines.ray_cluster import RayCluster
from qclip.study.formats import comma_separated
from qclip.study.found import find
from qclip.study.run import Ready, prepare, run
from qclip.study.store import StudyStore
from qclip.study.tasks import Queue
from tests.study.small import Told, ready_of

ray = pytest.importorskip("ray", reason="needs ray (extra ray)")
SIZES = {"num_cpus": 1, "object_store_memory": 200_000_000}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without processors, so that all work is done by nodes that can be lost, and two of these."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    made = Cluster(initialize_head=True, head_node_args=SIZES | {"num_cpus": 0})
    nodes = [made.add_node(**SIZES) for _ in range(2)]
    made.wait_for_nodes()
    made.workers = nodes
    yield made
    made.shutdown()


class Removing(Told):
    """Kills a node (its raylet, with -9) when the first task has ended: others have begun, or will."""

    def __init__(self, cluster: Any) -> None:
        super().__init__()
        self.cluster, self.removed = cluster, 0

    def ended(self, task: Any, worker: str, outcome: Any) -> None:
        super().ended(task, worker, outcome)
        if not self.removed:
            self.removed += 1
            self.cluster.remove_node(self.cluster.workers[0], allow_graceful=False)


@pytest.mark.slow
def test_a_node_that_is_lost_changes_no_number(cluster: Any, small: tuple[Ready, Told], tmp_path: Path) -> None:
    plan = small[0].grid.plan
    elsewhere = dataclasses.replace(small[0].work, store=str(tmp_path / "gone"))
    with pytest.raises(InputError, match="does not see the store"):
        RayCluster(cluster.address)(Queue([]), elsewhere, Told())
    ready = prepare(plan, StudyStore.create(tmp_path / "s"), threads=1, resident=1, apart=True)
    told = Removing(cluster)
    run(ready, RayCluster(cluster.address), told)
    assert told.removed == 1 and sorted(told.done) == sorted(ready.grid.cells()) and not told.failed
    assert comma_separated(find(ready.grid, ready.store)) == comma_separated(find(small[0].grid, small[0].store))


def test_an_address_that_does_not_answer_is_said(small: tuple[Ready, Told], tmp_path: Path) -> None:
    ready = ready_of(small[0].grid.plan, tmp_path / "s")
    for address, said in (("127.0.0.1:1", "answers"), ("nowhere", "no address"), ("auto", "answers")):
        with pytest.raises(InputError, match=said):
            RayCluster(address)(Queue(ready.todo), ready.work, Told())
