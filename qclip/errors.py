"""One exception family. A message says what was wrong, where, and what to do; the CLI prints it as one sentence."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

SHOWN = 24  # names in a hint


class QclipError(Exception):
    """Everything this package raises on purpose. The CLI exits with 1."""


class InputError(QclipError, ValueError):
    """Something the caller passed cannot be used. The CLI exits with 2."""


class ModelError(InputError):
    """A model that is unknown, not supported, or not what it says."""


class DataError(InputError):
    """A data set that is missing, empty, unreadable or too small."""


class RecipeError(InputError):
    """A recipe that is unknown or contradicts itself."""


class ArtifactError(InputError):
    """A stored artifact that is truncated, edited, foreign or newer than this version."""


class OutputExistsError(InputError):
    """The output is there already and `force` was not given."""


class OutputError(QclipError, OSError):
    """An output that could not be written after all: a full disk, or one that went away. What was there is unharmed."""


class NonFiniteError(QclipError):
    """NaN or Inf where numbers are needed; names the layer."""


class GradientError(QclipError, RuntimeError):
    """A gradient through a layer that has none."""


def option(name: str, value: object = "") -> str:
    """How the user gives an argument, for messages: `train=`, or, while a command runs, `--train`. value: what is
    given, where a flag stands for it on the command line."""
    return f"--{name}" if _in_command else f"{name}={value}"


@contextlib.contextmanager
def in_command() -> Iterator[None]:
    """While the block runs, messages name the options of the command line."""
    global _in_command
    before, _in_command = _in_command, True
    try:
        yield
    finally:
        _in_command = before


_in_command = False


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A hint for an unknown name: "did you mean 'a', 'b'?", or some of the known names when nothing is near."""
    known = list(known)
    folded = {k.lower(): k for k in reversed(known)}
    close = difflib.get_close_matches(name.lower(), folded, n=count, cutoff=0.4)
    if close:
        return "did you mean " + ", ".join(repr(folded[c]) for c in close) + "?"
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return "known: " + ", ".join(known[:SHOWN]) + more


def printable(text: str) -> str:
    """With a visible sign for each control character but newline and tab: a name out of a file commands no terminal."""
    return text.translate(_SIGNS)


_SIGNS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | dict.fromkeys(range(0x7F, 0xA0), 0x2421)
