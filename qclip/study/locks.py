"""Locks between processes that use one store: `flock`, so that a killed one holds nothing."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from qclip.errors import OutputError


@contextlib.contextmanager
def locked(path: Path, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of that file while the block runs; whether it does. Without `wait` it may be somebody else's. On a
    file system without locks nobody waits for anybody: what is written is whole all the same, perhaps twice. Who
    shares needs no place that can be written: it may only read. Raises OutputError where a lock of one's own cannot be
    made."""
    descriptor = _opened(path)
    if descriptor is None:
        if not shared:
            raise OutputError(
                f"the lock {str(path)!r} cannot be made; see that its folder can be written, and is not full"
            )
        yield True
        return
    try:
        held = True
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:
            pass
        yield held
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int | None:
    """The file of a lock, which is made; None where there is none and it cannot be."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with contextlib.suppress(OSError):  # on a disk that is full, or may be read alone
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return None
