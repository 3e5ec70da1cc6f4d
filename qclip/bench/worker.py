"""A peer's own process: `python -m qclip.bench.worker FOLDER DESCRIPTOR`, started by `seat.py`.

Descriptors 1 and 2 are a file, whatever writes to them. Orders come, and answers go, through a connection on
DESCRIPTOR: ("prepare",) -> ("doing", words)... ("ready", facts) or ("done",); ("time", number of the setting, calls) ->
("took", seconds). What goes wrong is ("failed", sentence), what an interrupt (SIGINT) stopped is ("stopped",).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .case import Case
from .peers import Peer, Setting


class TimeUpError(BaseException):
    """Preparing takes too long. No Exception: libraries catch those and go on."""


class Worker:
    def __init__(self, folder: Path, parent: Connection) -> None:
        self.parent, self.preparing = parent, False
        facts = torch.load(folder / "case.pt", weights_only=False, mmap=True)  # written by our own parent
        torch.set_num_threads(facts["threads"])
        self.wanted = facts.pop("wanted")
        self.say("loading the model")
        model = torch.load(folder / "model.pt", weights_only=False)
        peer: Peer = pickle.loads(facts.pop("peer"))
        own = folder / str(os.getpid())
        own.mkdir()
        case = Case(model, folder=own, say=self.say, **facts)
        self.coming: Iterator[Setting] = iter(peer.settings(case))
        self.settings: list[Setting] = []

    def say(self, words: str) -> None:
        self.parent.send(("doing", words))

    def interrupt(self, number: int, frame: Any) -> None:
        if self.preparing:
            self.preparing = False
            raise TimeUpError

    def prepare(self) -> tuple:
        """Make the next setting and call it once: that compiles what is compiled late, and shows what comes out."""
        self.preparing = True
        setting = next(self.coming, None)
        if setting is None:
            return ("done",)
        self.say(f"first call, {setting.name}")
        with torch.inference_mode():
            cosines = torch.nn.functional.cosine_similarity(setting.run().float(), self.wanted, dim=-1)
        self.settings.append(setting)
        return "ready", {
            "setting": setting.name,
            "exact": setting.exact,
            "instructions": setting.instructions,
            "cosine": float(cosines.mean()),
            "least": float(cosines.min()),
        }

    def time(self, number: int, calls: int) -> tuple:
        return "took", timed(self.settings[number].run, calls)

    def obey(self, order: tuple) -> tuple:
        try:
            return getattr(self, order[0])(*order[1:])
        except TimeUpError:
            return ("stopped",)
        except Exception as error:
            traceback.print_exc()
            return "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
        finally:
            self.preparing = False


@torch.inference_mode()
def timed(run: Any, calls: int) -> float:
    """Seconds of `calls` calls, after one that is not timed: whoever ran before left its data in the caches."""
    run()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - began


def main() -> None:
    folder, descriptor = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        try:
            worker = Worker(folder, parent)
        except Exception as error:
            traceback.print_exc()
            parent.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())}"))
            return
        signal.signal(signal.SIGINT, worker.interrupt)
        while True:
            parent.send(worker.obey(parent.recv()))


if __name__ == "__main__":
    main()
