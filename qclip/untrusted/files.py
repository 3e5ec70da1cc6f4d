"""Regular files only, a bounded number of bytes. A FIFO, a device or a file of /proc is refused, never waited for."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from ..errors import InputError


def reason(error: BaseException) -> str:
    """What another library's error says, as part of one sentence of ours."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return text if len(text) <= 200 else text[:200] + "..."


def _mode(path: Path) -> int:
    """0 where there is nothing, or a name that no file can have. Raises PermissionError and the like."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return 0
    except OSError as error:
        if error.errno in (36, 40):  # ENAMETOOLONG, ELOOP
            return 0
        raise


def expand(name: str | Path, refuse: type[InputError]) -> Path:
    """The path with its `~`. Raises `refuse` for the home of nobody."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise refuse(f"{str(name)!r} is no path ({reason(error)})") from None


def is_file(path: Path, refuse: type[InputError]) -> bool:
    """Whether a regular file is there. Raises `refuse` where that cannot be seen (permissions)."""
    try:
        return stat.S_ISREG(_mode(path))
    except OSError as error:
        raise refuse(f"{str(path)!r} cannot be read ({reason(error)})") from None


def is_folder(path: Path, refuse: type[InputError]) -> bool:
    """Whether a folder is there. Raises `refuse` where that cannot be seen (permissions)."""
    try:
        return stat.S_ISDIR(_mode(path))
    except OSError as error:
        raise refuse(f"{str(path)!r} cannot be read ({reason(error)})") from None


def inside(folder: Path, name: str, refuse: type[InputError]) -> Path:
    """`folder / name`, which must not be a link that leads out of the folder."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise refuse(f"{str(path)!r} is a link that leads out of its folder; put the file itself there")
    except (OSError, RuntimeError) as error:
        raise refuse(f"{str(path)!r} cannot be read ({reason(error)})") from None
    return path


def open_regular(path: Path, refuse: type[InputError]) -> BufferedReader:
    """The file, opened for reading bytes. Raises `refuse` for anything but a regular file that holds something."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: a device may act on that
            raise refuse(f"{str(path)!r} is no regular file")
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)), "rb")
    except (OSError, ValueError) as error:
        raise (
            error if isinstance(error, refuse) else refuse(f"{str(path)!r} cannot be read ({reason(error)})")
        ) from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:  # files of /proc have size 0, and some never end
        file.close()
        raise refuse(f"{str(path)!r} is empty, or no regular file")
    return file


def read_bytes(path: Path, limit: int, refuse: type[InputError]) -> bytes:
    """All of a regular file that has at most `limit` bytes. Raises `refuse`."""
    with open_regular(path, refuse) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise refuse(f"{str(path)!r} has {size} bytes; more than {limit} are not read")
        try:
            return file.read(size)
        except OSError as error:
            raise refuse(f"{str(path)!r} cannot be read ({reason(error)})") from None
