"""Files: read within limits, and written whole or not at all.

What is being written stands beside its place as `.qclip-XXXXXXXX.part`, locked (`flock`) by the process that writes it,
and moves into place when it is complete and synced. A process that is killed leaves its part behind; the next one that
writes into the same folder removes every part that nobody holds locked any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from .errors import InputError, OutputError, OutputExistsError, option

PART = re.compile(r"\.qclip-[0-9a-f]{8}\.part")
LIMIT = 64 << 20  # bytes of a text file that is read whole

PathLike = str | os.PathLike[str]


# Reading


def why_not_a_file(path: PathLike) -> str | None:
    """None for a regular file (or a link to one); else what stands in the way, as in "x.png: is a pipe"."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a NUL in the name
        return f"cannot be read ({error})"
    except OSError as error:
        if os.path.islink(path):
            return f"is a link that leads nowhere ({error.strerror})"
        return f"cannot be read ({error.strerror})"
    return None if stat.S_ISREG(mode) else f"is {_kind(mode)}"


def open_regular(path: PathLike) -> io.BufferedReader:
    """A regular file, opened for reading bytes; nothing that could block, or never end, is opened.

    A file whose size is 0 is read as empty: the files of /proc say so, and some of them wait or never end. Raises
    OSError whose `strerror` is a sentence's end ("is a pipe", "cannot be read (Permission denied)").
    """
    if reason := why_not_a_file(path):  # before it is opened: a device may act on that
        raise OSError(0, reason)
    try:
        # not blocking: it may have become a pipe since
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except OSError as error:
        raise OSError(error.errno, f"cannot be read ({error.strerror})") from error
    facts = os.fstat(file.fileno())
    if stat.S_ISREG(facts.st_mode) and facts.st_size:
        return file
    file.close()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(0, f"is {_kind(facts.st_mode)}")
    return open(os.devnull, "rb")


def read_text(path: PathLike, what: str, error: type[Exception] = InputError, limit: int = LIMIT) -> str:
    """The text of a regular UTF-8 file of at most `limit` bytes, without a byte order mark.

    what: names the kind of file in messages ("results file"). Raises `error` naming the file and the reason.
    """
    if not os.path.lexists(path):
        raise error(f"there is no {what} {_shown(path)}")
    try:
        with open_regular(path) as file:
            content = file.read(limit + 1)
    except OSError as reason:
        raise error(f"{what} {_shown(path)} {reason.strerror}; give a file") from None
    if not content:
        raise error(f"{what} {_shown(path)} is empty")
    if len(content) > limit:
        raise error(f"{what} {_shown(path)} is larger than {limit >> 20} MB, the most that is read")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{what} {_shown(path)} is not UTF-8 text (byte {reason.start})") from None


# Outputs, before the work


def check_file(path: PathLike, force: bool = False) -> None:
    """Raises, before any work, where no file can be written to `path`, or where one is there and `force` is not given.

    OutputExistsError: there is a file. InputError: a folder, device, FIFO, socket or dangling link; a name that cannot
    be; a place where nothing can be written. Links are followed. Only regular files are ever replaced.
    """
    with _checking(path):
        real, mode = _look(path)
        if mode is not None and stat.S_ISDIR(mode):
            raise InputError(f"{_shown(path)} is a folder; name a file")
        if mode is not None and not stat.S_ISREG(mode):
            raise InputError(f"{_shown(path)} is {_kind(mode)}, which is never replaced; name a file")
        if mode is not None and not force:
            raise OutputExistsError(
                f"{_shown(path)} exists already; name another output, or give {option('force', True)} to replace it"
            )
        _probe(real, real.parent)


def check_folder(path: PathLike, names: Collection[str], force: bool = False, alone: bool = False) -> None:
    """`check_file` for a folder that files of these `names` will be written to.

    `force`: where there are files of these names, they are replaced. `alone`: the folder holds nothing else, and is
    refused where it does; without, other files in it stay as they are.
    """
    with _checking(path):
        real, mode = _look(path)
        if mode is not None and not stat.S_ISDIR(mode):
            raise OutputExistsError(f"{_shown(path)} is {_kind(mode)}; name a folder")
        entries = set() if mode is None else {name for name in os.listdir(real) if not PART.fullmatch(name)}
        if entries and not force:
            raise OutputExistsError(
                f"{_shown(path)} is not empty; name another folder, or replace its files ({option('force', True)})"
            )
        if alone and (strangers := sorted(entries - set(names))):
            raise OutputExistsError(
                f"{_shown(path)} holds {strangers[0]!r}, which is no file of ours, and is not replaced; "
                "name another folder"
            )
        for name in sorted(entries & set(names)):
            mode = os.lstat(real / name).st_mode
            if not stat.S_ISREG(mode):
                raise InputError(
                    f"{_shown(real / name)} is {_kind(mode)}, which is never replaced; name another folder"
                )
        _probe(real, _place(real, alone))


@contextlib.contextmanager
def _checking(path: PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise InputError(f"{_shown(path)} cannot be written: {error.strerror or error}; name another output") from None


def _look(path: PathLike) -> tuple[Path, int | None]:
    """Where the output will be, links followed, and the mode of what is there."""
    text = os.fspath(path)
    if not text:
        raise InputError("the output has an empty name; name a file or a folder")
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise InputError(f"{_shown(path)} holds a control character; choose another name")
    real = Path(os.path.realpath(text))
    try:
        return real, os.lstat(real).st_mode
    except FileNotFoundError:
        if os.path.islink(text):
            raise InputError(f"{_shown(path)} is a link to nothing ({_shown(real)}); name another output") from None
        return real, None


def _probe(real: Path, place: Path) -> None:
    """Write a little where a part will stand: permissions, read-only and full disks show here."""
    while not os.path.lexists(place):
        place = place.parent
    longest = os.pathconf(place, "PC_NAME_MAX")
    if real != place and any(len(os.fsencode(name)) > longest for name in real.relative_to(place).parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    with _part(place) as (_, descriptor):
        os.write(descriptor, bytes(4096))
        os.fsync(descriptor)


# Writing


def write_atomic(path: PathLike, data: bytes, sync: bool = True) -> Path:
    """Make `data` the content of the file at `path`: a reader sees the old file or the new one, never a part.

    Missing folders are made. Without `sync` that holds for a killed process, not for a power cut. Raises OutputError,
    an OSError, where it cannot be written or where what is there is no regular file; the old content is then unharmed.
    """
    real = Path(os.path.realpath(path))
    with _writing(path):
        if os.path.lexists(real) and not stat.S_ISREG(mode := os.lstat(real).st_mode):
            raise OutputError(f"{_shown(path)} is {_kind(mode)}, which is never replaced; name a file")
        real.parent.mkdir(parents=True, exist_ok=True)
        with _part(real.parent) as (part, descriptor):
            with open(descriptor, "wb", closefd=False) as file:
                file.write(data)
            if sync:
                os.fsync(descriptor)
            os.replace(part, real)
        if sync:
            _sync(real.parent)
    return Path(path)


@contextlib.contextmanager
def whole_folder(path: PathLike, last: str, alone: bool = False) -> Iterator[Path]:
    """A fresh folder to write files into. When the block ends well they are in the folder `path`; when it does not, or
    the process is killed, `path` is as it was.

    A new folder appears at once. In an existing one files of the same names are replaced, each at once, the file `last`
    after the others. `alone`: the folder is ours and becomes exactly what was written, at once (a mount point: file by
    file). Check with `check_folder` before. Raises OutputError as `write_atomic` does.
    """
    real = Path(os.path.realpath(path))
    with _writing(path):
        place = _place(real, alone)
        place.mkdir(parents=True, exist_ok=True)
        with _part(place, folder=True) as (part, _):
            yield part
            written = sorted(part.iterdir(), key=lambda file: (file.name == last, file.name))
            for file in written:
                _sync(file)
            if not real.is_dir():
                part.rename(real)
            elif place != real:
                _swap(part, real)
            else:
                for file in written:
                    os.replace(file, real / file.name)
                for stale in set(os.listdir(real)) - {file.name for file in written} - {part.name} if alone else ():
                    (real / stale).unlink()
        _sync(real.parent)


@contextlib.contextmanager
def _writing(path: PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.__cause__ if isinstance(error, OutputError) else error  # a file in a folder: name the folder
        if not isinstance(reason, OSError):
            raise
        raise OutputError(
            f"{_shown(path)} could not be written: {reason.strerror or reason}; what was there before is unchanged"
        ) from reason


def _place(real: Path, alone: bool) -> Path:
    """The folder in which the part of a folder stands: beside it, where the part takes its place as a whole; else in it
    (it may be a mount point, or its parent somebody else's)."""
    joins = real.is_dir() and (not alone or os.path.ismount(real) or not os.listdir(real))
    return real if joins else real.parent


@contextlib.contextmanager
def _part(place: Path, folder: bool = False) -> Iterator[tuple[Path, int]]:
    """A new part in `place` and its descriptor, locked until the end; what is then left of it is removed."""
    remove_leftovers(place)
    descriptor, part = -1, place
    try:
        while True:
            part = place / f".qclip-{secrets.token_hex(4)}.part"
            if folder:
                part.mkdir()
            flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(part, flags | os.O_CLOEXEC, 0o666)
            with contextlib.suppress(OSError):  # a file system without locks: there leftovers are left, too
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if part.exists():
                break
            os.close(descriptor)  # before it was locked, another run took it for a leftover
            descriptor = -1
        yield part, descriptor
    finally:
        if part != place:
            _remove(part)
        if descriptor >= 0:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the parts in `folder` whose processes are gone. Those of living ones are locked, and stay."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in [e for e in entries if PART.fullmatch(e.name)]:
            with contextlib.suppress(OSError):  # locked, somebody else's, or gone by now
                facts = entry.stat(follow_symlinks=False)
                if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)) or facts.st_uid != os.geteuid():
                    continue
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(Path(entry.path))
                finally:
                    os.close(descriptor)


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            part.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(part: Path, real: Path) -> None:
    """Put the finished folder in the place of an old one, which is then the part, and goes. Where the file system
    cannot do this at once, a process killed in between leaves the old folder beside its place, under a name that shows.
    """
    if _exchange(part, real):
        return
    aside = real.with_name(f"qclip-{secrets.token_hex(4)}.old")
    real.rename(aside)
    try:
        part.rename(real)
    except BaseException:
        aside.rename(real)
        raise
    shutil.rmtree(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths of one file system change places, at once (Linux' renameat2); False where that is not offered."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "no file")


def _shown(path: PathLike) -> str:
    text = os.fspath(path)
    return repr(text if len(text) <= 200 else f"{text[:99]}...{text[-98:]}")
