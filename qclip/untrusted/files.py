"""Regular files only (`qclip.files.open_regular`), a bounded number of bytes, refused in the caller's error."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from .. import files
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
        file = files.open_regular(path)
    except OSError as error:
        raise refuse(f"{str(path)!r} {error.strerror}") from None
    if not os.fstat(file.fileno()).st_size:
        file.close()
        raise refuse(f"{str(path)!r} is empty")
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
