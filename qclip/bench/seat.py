"""The parent's end of a peer: starts its process, gives it orders, hears its answers, ends it."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qclip.errors import InputError

from .case import Case

LINES = 20  # of what a peer printed, where it failed


class Sitting(Protocol):
    """What preparing and measuring need of a peer: `Seat`, or a stand-in of a test."""

    name: str
    doing: str

    def ask(self, *order: Any) -> None: ...

    def answer(self, seconds: float) -> tuple | None: ...

    def interrupt(self) -> None: ...

    def end(self) -> None: ...

    def log(self) -> str: ...


class Seat:
    """A peer in a process of its own, which starts with the first order. doing: what it does now, in its words.

    Answers are those of `worker.py`, and ("ended", sentence) of a process that is gone.
    """

    def __init__(self, name: str, peer: Any, case: Case, wanted: Tensor) -> None:
        owner = peer if isinstance(peer, type) else type(peer)
        if owner.__module__ == "__main__":
            raise InputError(f"peer {name!r} runs in a process of its own; put {owner.__name__} into a file to import")
        self.name, self.doing, self.saturates = name, "starting", case.saturates
        self.folder = case.folder / name
        self.folder.mkdir()
        (self.folder / "model.pt").symlink_to(case.folder / "model.pt")
        facts = dict(
            peer=pickle.dumps(peer() if isinstance(peer, type) else peer),
            wanted=wanted,
            tower=case.tower,
            x=case.x,
            threads=case.threads,
            saturates=case.saturates,
        )
        torch.save(facts, self.folder / "case.pt")
        self._process: subprocess.Popen | None = None

    def ask(self, *order: Any) -> None:
        """Give an order; `answer` tells what came of it."""
        if self._process is None:
            self._start()
        with contextlib.suppress(OSError):  # it has gone: `answer` says so
            self._connection.send(order)

    def answer(self, seconds: float) -> tuple | None:
        """The answer to the last order, if it comes within `seconds`. What the peer says it does meanwhile goes to
        `doing`."""
        try:
            while self._connection.poll(seconds):
                found = self._connection.recv()
                if found[0] != "doing":
                    return found
                self.doing = found[1]
        except (EOFError, OSError):
            assert self._process is not None
            code = self._process.wait()
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            return "ended", f"its process ended {how}"
        return None

    def interrupt(self) -> None:
        """Stop preparing, as soon as Python is reached."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """End the process and what it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._connection.close()

    def log(self) -> str:
        """The last lines that the process printed, on either stream."""
        path = self.folder / "log"
        text = path.read_text(errors="replace") if path.is_file() else ""
        return "\n".join(text.splitlines()[-LINES:])

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what a crash would take with it is in the log
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        command = [sys.executable, "-m", "qclip.bench.worker", str(self.folder), str(theirs.fileno())]
        with open(self.folder / "log", "wb") as log, theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C is for us alone; we end it, and what it has started
            )


def write_model(model: torch.nn.Module, folder: Path) -> None:
    """Into `folder`, for the seats there. Raises InputError where the model cannot be written."""
    try:
        torch.save(model, folder / "model.pt")
    except (pickle.PicklingError, AttributeError, TypeError) as why:
        raise InputError(f"the model cannot be sent to its peers' processes ({why}); give it by name or file") from why
