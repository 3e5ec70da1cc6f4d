"""Threads that each compute on one core."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def pool(count: int, name: str) -> ThreadPoolExecutor:
    """`count` threads in which torch's own operations start no further ones. Close it by `with`."""
    everywhere = torch.get_num_threads()
    ready = threading.Barrier(count + 1)

    def alone() -> None:
        torch.get_num_threads()  # a thread that asks for the first time takes the number that all start with
        torch.set_num_threads(1)
        ready.wait()

    made = ThreadPoolExecutor(count, name, initializer=alone)
    for _ in range(count):
        made.submit(int)
    ready.wait()
    torch.set_num_threads(everywhere)  # the number is the thread's own, but later threads start with what was set last
    return made
