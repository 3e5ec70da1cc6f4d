"""The memory of programs: a workspace that those of a thread share, and what all programs of the process hold.

A thread runs one program at a time and results are copied out, so the temporaries of all its programs may lie in the
same bytes: as many as the largest of them needs. Together, workspaces and what programs hold for themselves stay
within `limit()` bytes; what does not fit is not kept, and its function runs without a program.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

import torch
from torch import Tensor

from qkernels import cpu

from .limits import UnrecordableError
from .memory import ALIGN

LIMIT = 512 << 20  # bytes; QKERNELS_PROGRAM_BYTES sets another figure

PROCESS = os.getpid()  # the process that imported this module


class NoRoomError(UnrecordableError):
    """A program would hold more bytes than are left for programs; the message says how many."""


class Ledger:
    """Bytes that programs on CPUs hold in this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a program that the garbage collector finds gives back within
        self.bytes = 0

    def change(self, by: int) -> None:
        """Take `by` bytes, or give them back where it is negative. Raises NoRoomError, and takes none, past `limit`."""
        most = limit() if by > 0 else 0
        with self._lock:
            if by > 0 and self.bytes + by > most:
                raise NoRoomError(
                    f"programs hold {self.bytes:,} bytes, and {by:,} more would pass the limit of {most:,} "
                    "(QKERNELS_PROGRAM_BYTES)"
                )
            self.bytes += by


ledger = Ledger()


def limit() -> int:
    """Bytes that programs may hold in this process: QKERNELS_PROGRAM_BYTES, else LIMIT. Raises ValueError where the
    variable is no whole number of at least 0."""
    text = os.environ.get("QKERNELS_PROGRAM_BYTES")
    if text is None:
        return LIMIT
    if not text.isdecimal():
        raise ValueError(f"QKERNELS_PROGRAM_BYTES={text}: give a whole number of bytes, such as {LIMIT}")
    return int(text)


def use_huge_pages(storages: list[torch.UntypedStorage]) -> None:
    """Where the system can. Not in a forked process, which would copy weights that it shares with its parent."""
    if os.getpid() == PROCESS:
        cpu.native.use_huge_pages([(storage.data_ptr(), storage.nbytes()) for storage in storages])


class Tenant(Protocol):
    """A program, as far as its memory goes: bytes that it needs in a workspace, and bytes that it holds besides."""

    workspace_bytes: int
    own_bytes: int

    def bind(self, buffer: Tensor) -> None: ...


class Workspace:
    """Bytes for the temporaries of programs that never run at the same time. Not for two threads at once."""

    def __init__(self) -> None:
        self._programs: weakref.WeakSet[Tenant] = weakref.WeakSet()
        self._taken = [0]
        self._buffer: Tensor = torch.empty(0, dtype=torch.uint8)
        weakref.finalize(self, _give_back, self._taken).atexit = False

    @property
    def bytes(self) -> int:
        return self._taken[0]

    def enter(self, program: Tenant) -> None:
        """Give `program` its memory, and grow for it. Raises NoRoomError."""
        ledger.change(program.own_bytes)
        weakref.finalize(program, ledger.change, -program.own_bytes).atexit = False
        self._programs.add(program)
        try:
            grown = self.fit()
        except NoRoomError:
            self._programs.discard(program)
            raise
        if not grown:
            program.bind(self._buffer)

    def fit(self) -> bool:
        """Grow to what the largest program needs now, or shrink to it where that is under half. -> whether it did."""
        need = max((p.workspace_bytes for p in self._programs), default=0) + ALIGN
        if need <= self._taken[0] <= 2 * need:
            return False
        ledger.change(need - self._taken[0])
        self._taken[0] = need
        with torch.inference_mode(False):
            raw = torch.empty(need, dtype=torch.uint8)
            self._buffer = raw[-raw.data_ptr() % ALIGN :]
        use_huge_pages([raw.untyped_storage()])
        for program in self._programs:
            program.bind(self._buffer)
        return True


def _give_back(taken: list[int]) -> None:
    ledger.change(-taken[0])
