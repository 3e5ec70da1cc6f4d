"""Names of files, shown in messages whatever they hold."""

from __future__ import annotations

import os

SHOWN_NAME = 160  # characters of a file's name in a message


def shown(name: str | os.PathLike[str]) -> str:
    """A file's name for a message: line breaks and bytes that are no text are escaped, a very long one is shortened."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in os.fspath(name))
    if len(text) > SHOWN_NAME:
        text = f"{text[: SHOWN_NAME - 43]}...{text[-40:]}"
    return text


def some(names: list[str], count: int = 5) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
