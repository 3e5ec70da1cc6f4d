"""Whole commands in processes of their own, forked from one that has imported everything: a start takes no time, and
whatever happens to the process - a signal, a limit, a closed stream - happens to nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGKILL
from typing import Any, TextIO

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.hostile.preloaded"])
# What changes files, by the name of the C function that Python calls: `posix.replace`, not `str.replace`.
SYSTEM = {"open", "close", "fsync", "flock", "mkdir", "rmdir", "rename", "replace", "unlink", "chmod", "scandir"}
METHODS = {"write", "close", "serialize_file"}  # of files that are open; safetensors' own writer


@dataclasses.dataclass
class Run:
    """A command that runs; `errors` is its stderr, to be read line by line as it comes."""

    process: Any
    errors: TextIO
    out: Path

    def wait(self) -> tuple[int, str, str]:
        """Exit code (minus a signal that killed it), stdout, and what is left of stderr."""
        errors = self.errors.read()
        self.process.join()
        return self.process.exitcode, self.out.read_text(encoding="utf-8", errors="replace"), errors


def start(
    arguments: list[str], folder: Path, before: Callable[..., None] | None = None, *given: Any, **environment: str
) -> Run:
    """`qclip ARGUMENTS...` in `folder`, as the console script runs it. `before(*given)` is called before."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    out = folder.parent / f"{folder.name}.{len(list(folder.parent.glob('*.stdout')))}.stdout"
    process = CONTEXT.Process(target=_child, args=(arguments, folder, out, writer, before, given, environment))
    process.start()
    writer.close()
    errors = open(os.dup(reader.fileno()), encoding="utf-8", errors="replace")
    reader.close()
    return Run(process, errors, out)


def run(arguments: list[str], folder: Path, *more: Any, **environment: str) -> tuple[int, str, str]:
    return start(arguments, folder, *more, **environment).wait()


def _child(
    arguments: list[str],
    folder: Path,
    out: Path,
    errors: Connection,
    before: Callable[..., None] | None,
    given: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(errors.fileno(), 2)
    errors.close()
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
    sys.argv = ["qclip", *arguments]
    from qclip.cli import main

    if before is not None:
        before(*given)
    code = main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def note_calls(log: Path) -> None:
    """Write the name of each call to a file when the process ends."""
    seen: list[str] = []
    _on_call(seen.append)
    leave = os._exit

    def noted(code: int) -> None:
        sys.setprofile(None)
        log.write_text("\n".join(seen))
        leave(code)

    os._exit = noted  # type: ignore[assignment]


def kill_at(moment: int, number: int = SIGKILL) -> None:
    """A signal, right before the call of that number, counted from 1."""
    left = moment

    def count(_: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)

    _on_call(count)


def _on_call(tell: Callable[[str], None]) -> None:
    def profile(_frame: Any, event: str, function: Any) -> None:
        if event != "c_call":
            return
        owner = function.__module__ or type(function.__self__).__name__
        if function.__name__ in (SYSTEM if owner in ("posix", "fcntl", "_io", "io") else METHODS):
            if owner in ("posix", "fcntl", "_io", "io", "BufferedWriter") or function.__name__ == "serialize_file":
                tell(function.__name__)

    threading.setprofile(profile)
    sys.setprofile(profile)
