"""What a command has of its process: streams that may be closed or gone, and signals that end it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from qclip.errors import printable

# Exit codes: it ran and something failed; what was given cannot be used; Ctrl-C.
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
# Ctrl-C, `kill`, and a terminal that is closed.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def open_streams() -> None:
    """Open /dev/null for standard streams that the caller closed: else a file that is opened later would get their
    descriptor, and be printed into. A character that a stream's encoding lacks is printed as an escape."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def say(message: str) -> None:
    """One line on stderr. A stderr that is gone is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(message), file=sys.stderr, flush=True)


def stdout_fault() -> OSError | None:
    """Why the output cannot be written; None where it can. What is left of it is then dropped: else the interpreter
    would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
            sys.stdout.flush()
        return error
    return None


class Endings:
    """The signal that asked the command to end, if one did."""

    def __init__(self) -> None:
        self.received: int | None = None

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells count: 130 for Ctrl-C."""
        return 128 + (self.received or signal.SIGINT)

    def stop(self, number: int, frame: Any) -> None:
        self.received = self.received or (signal.SIGINT if number == signal.SIGALRM else number)
        raise KeyboardInterrupt

    def unraisable(self, fault: Any) -> None:
        """Where Python calls back from C - a weak reference dies in the middle of an import - no exception gets out,
        this one neither: it is raised again a moment later."""
        if fault.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0.001)
        else:
            sys.__unraisablehook__(fault)


@contextlib.contextmanager
def endings() -> Iterator[Endings]:
    """Within it SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that everything cleans up behind itself. What
    the caller ignores (nohup) stays ignored."""
    found = Endings()
    if threading.current_thread() is not threading.main_thread():  # no signal comes here
        yield found
        return
    handlers = {number: signal.getsignal(number) for number in (*ENDING, signal.SIGALRM)}
    hook = sys.unraisablehook
    try:
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, found.stop)
        sys.unraisablehook = found.unraisable
        yield found
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
