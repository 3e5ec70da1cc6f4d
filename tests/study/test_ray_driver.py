"""What is asked of a Ray cluster, and what is made of its answers, on one that stands in for Ray."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qclip.errors import InputError, OutputError
from qclip.study.engines import Work, ray_cluster
from qclip.study.engines.ray_cluster import RayCluster, resources
from qclip.study.measure import Outcome
from qclip.study.store import StudyStore
from qclip.study.tasks import Queue
from tests.study.small import Told, plan_of, ready_of
from tests.study.test_store import rows_of


class Standing:
    """Runs remote functions when they are asked for. `does`: what a node makes of one, by its address."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            cause: Exception

    def __init__(self, **nodes: dict[str, int]) -> None:
        self.all = [
            {"Alive": True, "NodeID": name, "NodeManagerAddress": name, "Resources": has} for name, has in nodes.items()
        ]
        self.asked: list[dict[str, Any]] = []
        self.does: Any = lambda address, function, *args: function(*args)
        self.never = False  # whether no answer comes

    def nodes(self) -> list[dict[str, Any]]:
        return self.all

    def remote(self, **options: Any) -> Any:
        def decorated(function: Any) -> Any:
            def call(*args: Any) -> Any:
                self.asked.append(options)
                where = options.get("scheduling_strategy")
                return lambda: self.does(where and where.node_id, function, *args)

            return types.SimpleNamespace(remote=call)

        return decorated

    def get(self, reference: Any) -> Any:
        return reference()

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> Any:
        return ([], references) if self.never else (references[:1], references[1:])

    def init(self, **_: Any) -> None:
        pass

    def shutdown(self) -> None:
        pass


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standing]:
    found = Standing(head={"CPU": 2}, other={"CPU": 4, "GPU": 1})
    strategies = types.ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda node_id, soft: types.SimpleNamespace(node_id=node_id)  # type: ignore[attr-defined]
    for name in ("ray", "ray.util"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    monkeypatch.setattr(ray_cluster, "_ray", lambda: found)
    yield found


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(StudyStore.create(tmp_path / "s").url, "r", 1)


def run(work: Work, *tasks: Any) -> Told:
    told = Told()
    RayCluster("auto")(Queue(tasks), work, told)
    return told


def test_threads_are_cpus_and_cuda_is_a_gpu(work: Work) -> None:
    on = dataclasses.replace
    assert resources(on(work, threads=3)) == {"num_cpus": 3}
    assert resources(on(work, threads=2, device="cuda")) == {"num_cpus": 2, "num_gpus": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 5}, "no node of the Ray cluster has 5 CPU; give fewer --threads"),
        ({"threads": 3, "device": "cuda"}, ""),
        ({"threads": 5, "device": "cuda"}, "has 5 CPU and 1 GPU"),
        ({"device": "cuda:1"}, "give --device cuda, not cuda:1"),
    ],
)
def test_a_task_that_no_node_can_run_is_refused_not_waited_for(
    change: dict[str, Any], said: str, standing: Standing, work: Work
) -> None:
    asked = dataclasses.replace(work, **change)
    if not said:
        run(asked)
        standing.all[1]["Alive"] = False
        said = "has 3 CPU and 1 GPU"
    with pytest.raises(InputError, match=said):
        run(asked)


def answers(of: str, change: dict[str, str]) -> Any:
    return lambda address, function, *args: function(*args) | (change if address == of else {})


def test_a_node_of_another_version_is_named(standing: Standing, work: Work) -> None:
    run(work)
    standing.does = answers("other", {"qclip": "0.0.1"})
    with pytest.raises(InputError, match="the node other has qclip 0.0.1, here it is"):
        run(work)
    standing.does = answers("head", {"torch": "1.0"})
    with pytest.raises(InputError, match="the node head has torch 1.0"):
        run(work)


def test_a_node_without_the_package_or_the_store_is_named(standing: Standing, work: Work) -> None:
    def missing(address: str, *_: Any) -> Any:
        raise standing.exceptions.RayError("a long story\nModuleNotFoundError: No module named 'qclip'")

    standing.does = missing
    with pytest.raises(InputError, match="the node head cannot run qclip .ModuleNotFoundError.*; install the same"):
        run(work)
    standing.does = lambda address, function, *args: function(*args)
    with pytest.raises(InputError, match="the node head does not see the store .*or give a URL"):
        run(dataclasses.replace(work, store=work.store + "-gone"))


def test_what_a_lost_worker_was_at_is_done_again_and_given_up_at_the_third_time(
    standing: Standing, tmp_path: Path
) -> None:
    ready = ready_of(plan_of(tmp_path), tmp_path / "t", apart=True, resident=1)
    first, *others = ready.todo
    doomed = next(task for task in others if len(task.cells) > 1)
    lost = {first.key: 2, doomed.key: 3}
    kept, *rest = doomed.cells

    def does(address: Any, function: Any, *args: Any) -> Any:
        if function is not ray_cluster._measure:
            return function(*args)
        task = args[1]
        if lost.get(task.key, 0):
            lost[task.key] -= 1
            if task is doomed:  # before it died
                ready.store.write(ready.work.runtime, kept, rows_of(kept), "{}", None)
            raise standing.exceptions.RayError("the node died\nwith details")
        return Outcome(done=task.cells)

    standing.does = does
    told = Told()
    RayCluster("auto")(Queue(ready.todo), ready.work, told)
    assert sorted(told.failed) == sorted(rest) and kept in told.done
    assert sorted(told.done + told.failed) == sorted(ready.grid.cells())
    why = ready.store.failed(ready.work.runtime)
    assert {each["error"] for each in why.values()} == {"3 workers were lost at it (the node died)"}
    assert all(options["max_retries"] == 0 for options in standing.asked if "max_retries" in options)


def test_an_error_of_the_store_on_a_node_ends_the_run(standing: Standing, tmp_path: Path) -> None:
    ready = ready_of(plan_of(tmp_path), tmp_path / "t", apart=True)

    def does(address: Any, function: Any, *args: Any) -> Any:
        if function is ray_cluster._measure:
            error = standing.exceptions.RayTaskError("a remote traceback")
            error.cause = OutputError("no space left on device")
            raise error
        return function(*args)

    standing.does = does
    with pytest.raises(OutputError, match="^no space left on device$"):
        RayCluster("auto")(Queue(ready.todo), ready.work, Told())


def test_a_cluster_that_lost_all_its_nodes_is_not_waited_for(
    standing: Standing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "IDLE", 0.0)
    ready = ready_of(plan_of(tmp_path), tmp_path / "t", apart=True)

    class Losing(Told):
        def began(self, task: Any, worker: str) -> None:
            standing.never = True
            for node in standing.all:
                node["Alive"] = False

    with pytest.raises(OutputError, match="no node of the Ray cluster has 1 CPU any more.*goes on"):
        RayCluster("auto")(Queue(ready.todo), ready.work, Losing())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.0"), "has another version of Ray"),
        (ConnectionError("Could not find any running Ray instance.\nMore"), "no Ray cluster answers at auto .Could"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_sentence(
    error: Exception, said: str, standing: Standing, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(standing, "init", init)
    with pytest.raises(InputError, match=said) as caught:
        run(work)
    assert "\n" not in str(caught.value)
