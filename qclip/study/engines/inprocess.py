"""One task after the other, in this process."""

from __future__ import annotations

import functools
import time

import torch

from ..measure import Bench
from ..store import StudyStore
from ..tasks import Queue
from . import WAIT, Told, Work

HERE = "this process"


def run(queue: Queue, work: Work, told: Told) -> None:
    """Raises OutputError where the store cannot be written."""
    before = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    try:
        report = functools.partial(told.progress, HERE)
        bench = Bench(StudyStore.open(work.store), work.runtime, work.threads, work.device, report)
        while (task := queue.take()) is not None:
            told.began(task, HERE)
            outcome = bench.run(task)
            if outcome.busy:
                queue.put_back(task)
                time.sleep(WAIT)
            else:
                queue.finish(task)
                told.ended(task, HERE, outcome)
    finally:
        torch.set_num_threads(before)
