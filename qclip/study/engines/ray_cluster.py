"""A Ray cluster (extra `ray`): a task is a Ray task, which asks for as many CPUs as it has threads, and on `cuda` for a
GPU. What a lost node was at is done again elsewhere.

All nodes must see the store, a folder under one path (a local disk for one machine, NFS for several) or a URL, and have
the same version of the package.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from typing import Any

from qclip.errors import InputError, OutputError, QclipError
from qclip.machine import environment

from ..facts import runtime_key, runtime_of
from ..measure import Bench, Outcome
from ..store import StudyStore
from ..tasks import Queue, Task
from . import WAIT, Told, Work, given_up

LOST = 3  # nodes or workers that a task may cost
IDLE = 10.0  # seconds without an answer until it is looked whether any node is left
ANSWER = 5.0  # seconds in which an address must answer
_BENCHES: dict[Work, Bench] = {}  # of this worker process


class RayCluster:
    """An engine on the cluster at `address` ("auto": the one that this machine belongs to)."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __call__(self, queue: Queue, work: Work, told: Told) -> None:
        """Raises InputError where the cluster does not answer, or its nodes lack what they need, OutputError where the
        store cannot be written."""
        ray = _ray()
        self._connect(ray)
        try:
            _check_nodes(ray, work)
            _Driver(ray, queue, work, told).drive()
        finally:
            ray.shutdown()

    def _connect(self, ray: Any) -> None:
        if self.address != "auto":
            host, _, port = self.address.rpartition(":")
            if not host or not port.isdecimal():
                raise InputError(f"--ray {self.address!r} is no address; give HOST:PORT, or auto")
            try:
                socket.create_connection((host, int(port)), ANSWER).close()
            except OSError as why:
                raise InputError(
                    f"no Ray cluster answers at {self.address} ({why}); start one: ray start --head"
                ) from None
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as why:
            first = str(why).strip().splitlines()[0]
            if "ersion mismatch" in first:
                raise InputError(
                    f"the Ray cluster at {self.address} has another version of Ray or Python ({first}); "
                    "make them the same"
                ) from None
            raise InputError(
                f"no Ray cluster answers at {self.address} ({first}); start one: ray start --head"
            ) from None


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("Ray is not installed; pip install 'qclip[ray]'") from None
    return ray


class _Driver:
    """Gives ready tasks to the cluster, and takes what comes back."""

    def __init__(self, ray: Any, queue: Queue, work: Work, told: Told) -> None:
        self.ray, self.queue, self.work, self.told = ray, queue, work, told
        self.remote = ray.remote(**resources(work), max_retries=0)(_measure)
        self.lost: Counter[str] = Counter()

    def drive(self) -> None:
        """Raises OutputError where no node is left that could go on."""
        running: dict[Any, Task] = {}
        heard = time.monotonic()
        while not self.queue.over:
            while (task := self.queue.take()) is not None:
                self.told.began(task, task.key[:8])
                running[self.remote.remote(self.work, task)] = task
            ended, _ = self.ray.wait(list(running), num_returns=1, timeout=WAIT)
            for reference in ended:
                self._take(reference, running.pop(reference))
            if ended:
                heard = time.monotonic()
            elif time.monotonic() - heard > IDLE:
                heard = time.monotonic()
                if why := _too_small(self.ray, self.work):
                    raise OutputError(f"{why} any more; what is measured is kept: started again, the run goes on")

    def _take(self, reference: Any, task: Task) -> None:
        name = task.key[:8]
        try:
            outcome = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, QclipError) else error
            raise cause from None
        except self.ray.exceptions.RayError as error:  # a worker or its node is gone
            self.lost[task.key] += 1
            if self.lost[task.key] < LOST:
                self.queue.put_back(task, soon=True)
                return
            why = f"{LOST} workers were lost at it ({str(error).splitlines()[0]})"
            outcome = given_up(task, self.work, why)
        if outcome.busy:
            self.queue.put_back(task)
        else:
            self.queue.finish(task)
            self.told.ended(task, name, outcome)


def resources(work: Work) -> dict[str, int]:
    """What a task asks Ray for, by the names of `ray.remote`."""
    return {"num_cpus": work.threads} | ({"num_gpus": 1} if work.device == "cuda" else {})


def _measure(work: Work, task: Task) -> Outcome:
    """On a node: the bench stays with its process."""
    import torch

    torch.set_num_threads(work.threads)
    if work not in _BENCHES:
        store = StudyStore.open(work.store)
        facts = runtime_of(work.device, work.threads, task.measured.batch)
        own = runtime_key(facts)  # of this node: its processor may be another
        if own != work.runtime:
            store.note_runtime(own, facts)
        _BENCHES[work] = Bench(store, own, work.threads, work.device)
    try:
        return _BENCHES[work].run(task)
    except OutputError as error:
        raise OutputError(str(error)) from None  # without what cannot be pickled


def _check_nodes(ray: Any, work: Work) -> None:
    """Some node is large enough for a task; every node has our version, and sees the store. Raises InputError."""
    if work.device not in ("cpu", "cuda"):
        raise InputError(f"Ray decides which GPU a task gets; give --device cuda, not {work.device}")
    if why := _too_small(ray, work):
        raise InputError(f"{why}; give fewer --threads, or start such a node")
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    ours, asked = _versions(), {}
    for node in ray.nodes():
        if node["Alive"]:
            strategy = On(node_id=node["NodeID"], soft=False)
            remote = ray.remote(num_cpus=0, scheduling_strategy=strategy)(_node)
            asked[remote.remote(work)] = node["NodeManagerAddress"]
    for reference, address in asked.items():
        try:
            theirs = ray.get(reference)
        except ray.exceptions.RayError as why:
            last = str(why).strip().splitlines()[-1]
            raise InputError(f"the node {address} cannot run qclip ({last}); install the same version there") from None
        if why := theirs.pop("the store"):
            raise InputError(
                f"the node {address} does not see the store ({why}); share that folder with it, or give a URL"
            )
        for name, value in ours.items():
            if theirs[name] != value:
                raise InputError(
                    f"the node {address} has {name} {theirs[name]}, here it is {value}; make them the same"
                )


def _too_small(ray: Any, work: Work) -> str:
    """Why no node of the cluster can run a task, "" where one can."""
    wanted = {name.removeprefix("num_").upper()[:3]: count for name, count in resources(work).items()}
    for node in ray.nodes():
        if node["Alive"] and all(node["Resources"].get(name, 0) >= count for name, count in wanted.items()):
            return ""
    return "no node of the Ray cluster has " + " and ".join(f"{count} {name}" for name, count in wanted.items())


def _versions() -> dict[str, str]:
    found = environment()["versions"]
    return {name: found.get(name, "none") for name in ("qclip", "torch", "numpy", "python")}


def _node(work: Work) -> dict[str, str]:
    """On a node: its versions, and as "the store" why it cannot use that."""
    why = ""
    try:
        StudyStore.open(work.store)
    except InputError as error:
        why = str(error)
    return _versions() | {"the store": why}
