"""Files of any origin: opened only where they are regular, and named so that any name can be shown."""

from __future__ import annotations

import io
import os
import stat

SHOWN_NAME = 160  # characters of a file's name in a message

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def why_not_a_file(path: str | os.PathLike[str]) -> str | None:
    """None for a regular file (or a link to one); else what stands in the way, as in "x.png: is a pipe"."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL in the name
        return f"cannot be read ({error})"
    except OSError as error:
        if os.path.islink(path):
            return f"is a link that leads nowhere ({error.strerror})"
        return f"cannot be read ({error.strerror})"
    return None if stat.S_ISREG(mode) else f"is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}"


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """A regular file, opened for reading; nothing that could block is opened. Raises OSError whose `strerror` is a
    sentence's end ("is a pipe", "cannot be read (Permission denied)")."""
    if reason := why_not_a_file(path):
        raise OSError(0, reason)
    try:
        # not blocking: it may have become a pipe since
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise OSError(error.errno, f"cannot be read ({error.strerror})") from error


def shown(name: str | os.PathLike[str]) -> str:
    """A file's name for a message: line breaks and bytes that are no text are escaped, a very long one is shortened."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in os.fspath(name))
    if len(text) > SHOWN_NAME:
        text = f"{text[: SHOWN_NAME - 43]}...{text[-40:]}"
    return text


def some(names: list[str], count: int = 5) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
