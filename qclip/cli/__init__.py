"""The `qclip` command. Each command is a file here: it parses, calls the API, prints; it decides nothing."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from . import process
from .process import BAD_INPUT, FAILED, INTERRUPTED

STOPPED = "interrupted; nothing half-written was left behind"
# What the system says of a path that was given.
BAD_PATH = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (ran, something failed), 2 (bad input), 128 + N (signal N).

    Errors are one sentence on stderr; `--debug`, anywhere on the line, shows the traceback as well. Without arguments
    it is the program: it takes those of the command line, and ends the process itself when a signal asked for that.
    """
    program = arguments is None
    if program:
        process.open_streams()
    with process.endings() as ending:
        code = _guarded(list(sys.argv[1:] if arguments is None else arguments), ending)
    if program:
        for number in process.ENDING:  # only the interpreter's own shutdown is left to interrupt
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        if ending.received:  # perhaps in the middle of an import: half-made modules must not clean up
            os._exit(code)
    return code


def _guarded(arguments: list[str], ending: process.Endings) -> int:
    from qclip.errors import in_command

    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings(), in_command():
            warnings.showwarning = _warn
            code = _run([a for a in arguments if a != "--debug"])
        fault: Any = None
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if debug and not isinstance(error, SystemExit):
            import traceback

            traceback.print_exc()
        code, fault = FAILED, error
    if ending.received or code == INTERRUPTED or isinstance(fault, KeyboardInterrupt):
        process.stdout_fault()
        return _say(STOPPED, ending.exit_code)
    unwritten = process.stdout_fault()
    if type(fault) in (OSError, BrokenPipeError) and fault.filename is None:  # out of a print: files have names
        unwritten = fault
    if unwritten is not None:
        if not isinstance(unwritten, BrokenPipeError):  # the reader has gone: not our failure to explain
            _say(f"stdout could not be written: {unwritten.strerror}", FAILED)
        return FAILED
    return code if fault is None else _explained(fault)


def _run(arguments: list[str]) -> int:
    from .app import app

    code = app(arguments, prog_name="qclip", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _explained(error: BaseException) -> int:
    """One sentence about an error, and its exit code."""
    from qclip.errors import InputError, QclipError

    if isinstance(error, (BrokenPipeError, SystemExit)):
        return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else FAILED
    if type(error).__name__ == "Abort":
        return _say(STOPPED, INTERRUPTED)
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help text, printed already
        return BAD_INPUT
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own: a flag or an argument
        command = getattr(getattr(error, "ctx", None), "command_path", "qclip")
        return _say(f"{error.format_message().rstrip('.')}; see `{command} --help`", error.exit_code)
    if isinstance(error, QclipError):
        return _say(str(error), BAD_INPUT if isinstance(error, InputError) else FAILED)
    kernels = sys.modules.get("qkernels")  # not imported here: it brings torch, and help must not wait for that
    if kernels is not None and isinstance(error, kernels.SettingError):
        return _say(str(error), BAD_INPUT)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return _say(f"{error.filename!r}: {error.strerror}", BAD_INPUT if error.errno in BAD_PATH else FAILED)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        return _say("there is not enough memory for this; a smaller --batch needs less", FAILED)
    return _say(f"{type(error).__name__}: {error}; run it again with --debug to see where", FAILED)


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning as one line: the place in our code that raised it is of no use to whoever typed a command."""
    process.say(f"warning: {' '.join(str(message).split())}")


def _say(message: str, code: int) -> int:
    process.say(f"qclip: {' '.join(message.split())}")
    return code
