"""What local workers say, or that they say nothing any more, decides what becomes of their task."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qclip.errors import OutputError
from qclip.study.engines.processes import LOST, Processes
from qclip.study.run import Ready
from qclip.study.tasks import Queue, Task
from tests.study.small import Told, plan_of, ready_of


class Worker:
    """Says one thing of the task that it has; None: it is gone."""

    name = "worker 1"

    def __init__(self, said: Any) -> None:
        self.task: Task | None = None
        self.said = said

    def hear(self) -> Any:
        return self.said

    def restart(self) -> int:
        self.task = None
        return -9


@pytest.fixture
def ready(tmp_path: Path) -> Ready:
    return ready_of(plan_of(tmp_path), tmp_path / "store", workers=2)


def attended(worker: Worker, queue: Queue, ready: Ready, told: Told, lost: Counter[str]) -> Task:
    worker.task = task = queue.take()
    assert task is not None
    Processes(1)._attend(worker, queue, ready.work, told, lost)  # type: ignore[arg-type]
    return task


def test_a_task_that_costs_workers_is_the_next_again_and_given_up_at_the_third(ready: Ready) -> None:
    queue, told, lost = Queue(ready.todo), Told(), Counter[str]()
    tried = []
    for number in range(1, LOST + 1):
        tried.append(attended(Worker(None), queue, ready, told, lost))
        assert len(told.outcomes) == (number == 3)
    assert len(set(map(id, tried))) == 1 and told.failed == tried[0].cells
    whys = {why["error"] for why in ready.store.failed(ready.work.runtime).values()}
    assert whys == {"3 workers ended at it, the last with -9"}
    assert queue.take() is not tried[0]


def test_a_store_that_a_worker_cannot_write_ends_the_run(ready: Ready) -> None:
    queue, told = Queue(ready.todo), Told()
    with pytest.raises(OutputError, match="full"):
        attended(Worker(OutputError("full")), queue, ready, told, Counter())
    assert told.outcomes == []
