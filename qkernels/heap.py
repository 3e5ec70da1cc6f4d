"""Gives free memory in the C library's heap back to the system, for long-running processes."""

from __future__ import annotations

import ctypes


def release_memory() -> bool:
    """Give what is free in the C library's heap back to the system. Returns whether something was given back.

    Tensors of many sizes, made and dropped for hours, leave holes between those that live: the resident memory of a
    server rises by about an eighth, and glibc keeps the holes for later calls. This is glibc's `malloc_trim(0)`: a few
    milliseconds, for example every thousand requests or when idle; what is in use stays where it is. Where the C
    library has no such function (musl, macOS), nothing happens. No other call of this package touches the allocator.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(ctypes.c_size_t(0)))
