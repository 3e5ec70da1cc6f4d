"""The process that workers are forked from: it has imported what they need, so that one begins at once. It runs
nothing, and so has no threads that a fork would lose (torch's and OpenMP's begin with the first work; jemalloc, which
Arrow brings along, makes its own again).

Started before this process imports as much itself, it does so at the same time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from multiprocessing.util import Finalize

LIBRARIES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
IMPORTED = ["qclip.study.measure"]


def start() -> ForkServerContext:
    """Starts it where it does not run; what makes workers. It sees the environment of now: a worker must be given its
    own. Ctrl-C never reaches it and them: this process, which it does reach, ends them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    resource_tracker.ensure_running()  # here: it unblocks what is blocked
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # is inherited
    try:
        with _environment(dict.fromkeys(LIBRARIES, "1")):  # read when a library is loaded; a worker may set more later
            forkserver.ensure_running()
        if (server := _server()) not in _ENDED_AT_EXIT:
            _ENDED_AT_EXIT.add(server)
            Finalize(None, _end, (server,), exitpriority=-1)  # of this process, not of its children
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context


_ENDED_AT_EXIT: set[int] = set()


def _server() -> int:
    return forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined,no-any-return]


def _end(server: int) -> None:
    """By itself it would end when it has imported: until then who reads what this process printed would wait."""
    if server == _server():
        with contextlib.suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)


@contextlib.contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
