"""The `qclip` command. Each command is a file here: it parses, calls the API, prints; it decides nothing."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
STOPPED = "interrupted; nothing half-written was left behind"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (ran, something failed), 2 (bad input), 130 (Ctrl-C).

    Errors are one sentence on stderr; `--debug`, anywhere on the line, shows the traceback as well.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    from qclip.errors import InputError, QclipError

    from .app import app

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = app(arguments, prog_name="qclip", standalone_mode=False)
        if code == INTERRUPTED:  # newer releases of typer turn Ctrl-C into this code, older ones into Abort
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _say(STOPPED, INTERRUPTED)
    except (BrokenPipeError, SystemExit) as error:  # the reader of our output has gone: not our failure to explain
        return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
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
        return _say(f"{type(error).__name__}: {error}; run it again with --debug to see where", FAILED)


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning as one line: the place in our code that raised it is of no use to whoever typed a command."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _say(message: str, code: int) -> int:
    print(f"qclip: {' '.join(message.split())}", file=sys.stderr)
    return code
