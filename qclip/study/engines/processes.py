"""Several processes on this machine, each with its share of the threads. One that is lost loses the task that it was
at, which another one does again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from typing import Any

from qclip.errors import InputError, OutputError

from ..forking import LIBRARIES, start
from ..measure import Bench, Outcome
from ..store import StudyStore
from ..tasks import Queue, Task
from . import WAIT, Told, Work, given_up

LOST = 3  # workers that a task may cost
OFTEN = 0.5  # seconds between two reports of a worker


class Processes:
    """An engine with so many worker processes."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __call__(self, queue: Queue, work: Work, told: Told) -> None:
        """Raises OutputError where the store cannot be written, InputError where it was edited."""
        lost: Counter[str] = Counter()
        pool = [_Worker(number, work) for number in range(1, self.workers + 1)]
        try:
            while not queue.over:
                for worker in pool:
                    if worker.task is None and (task := queue.take()) is not None:
                        told.began(task, worker.name)
                        worker.give(task)
                for worker in _ready(pool):
                    self._attend(worker, queue, work, told, lost)
        finally:
            for worker in pool:
                worker.end()

    def _attend(self, worker: _Worker, queue: Queue, work: Work, told: Told, lost: Counter[str]) -> None:
        task, said = worker.task, worker.hear()
        if said is None:  # it is gone
            code = worker.restart()
            if task is None:
                return
            lost[task.key] += 1
            if lost[task.key] < LOST:
                queue.put_back(task, soon=True)
            else:
                queue.finish(task)
                told.ended(task, worker.name, given_up(task, work, f"{LOST} workers ended at it, the last with {code}"))
        elif isinstance(said, BaseException):
            raise said
        elif isinstance(said, Outcome):
            assert task is not None
            worker.task = None
            if said.busy:
                queue.put_back(task)
                time.sleep(WAIT)
            else:
                queue.finish(task)
                told.ended(task, worker.name, said)
        else:
            told.progress(worker.name, *said)


def _ready(pool: list[_Worker]) -> list[_Worker]:
    by_handle = {handle: worker for worker in pool for handle in (worker.connection, worker.process.sentinel)}
    found = wait(list(by_handle), timeout=1)
    return list(dict.fromkeys(by_handle[handle] for handle in found))  # type: ignore[index]


class _Worker:
    """A process that does one task after the other, and the line to it."""

    def __init__(self, number: int, work: Work) -> None:
        self.name, self._work = f"worker {number}", work
        self.task: Task | None = None
        self._start()

    def _start(self) -> None:
        forking = start()
        self.connection, theirs = forking.Pipe()
        environment = os.environ | dict.fromkeys(LIBRARIES, str(self._work.threads))
        given = theirs, self._work, environment
        self.process = forking.Process(target=_serve, args=given, daemon=True, name=self.name)
        self.process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        self.task = task
        with contextlib.suppress(OSError):  # gone: `hear` tells
            self.connection.send(task)

    def hear(self) -> Any:
        """What it says: its outcome, how far it is, an error; None where it is gone."""
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def restart(self) -> int | None:
        """Another process in its place; how the old one ended."""
        self.end()
        code, self.task = self.process.exitcode, None
        self._start()
        return code

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, work: Work, environment: dict[str, str]) -> None:
    """The worker's process: Ctrl-C is the parent's, which ends this one; without a parent it ends by itself."""
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(work.threads)
    last = 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= OFTEN or done == total:
            last = now
            connection.send((what, done, total))

    bench = Bench(StudyStore.open(work.store), work.runtime, work.threads, work.device, report)
    with contextlib.suppress(EOFError, ConnectionError):  # the latter: and has not read all that was said
        while True:
            task = connection.recv()
            try:
                connection.send(bench.run(task))
            except BrokenPipeError:
                raise
            except (OutputError, InputError) as error:
                connection.send(type(error)(str(error)))
