"""Where a kernel runs: the chip's facts, which configurations are chosen by, and the guard that makes its device the
current one."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chip:
    """What configurations depend on: capability as major * 10 + minor, streaming multiprocessors, and the shared
    memory in bytes that one block may use."""

    capability: int
    multiprocessors: int
    shared: int


# Limits per block by capability, as the programming guide lists them (KiB, less the 1 KiB the driver keeps).
_SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}

SM80 = Chip(80, 108, 163 * 1024)  # A100
SM90 = Chip(90, 132, 227 * 1024)  # H100, H200
#: What the interpreter pretends to be: few programs, so that persistent loops go round more than once.
INTERPRETER = Chip(90, 3, 227 * 1024)


def chip(device: torch.device) -> Chip:
    """The chip of a device; for CPU tensors, which only the interpreter takes, its pretended one."""
    if device.type != "cuda":
        return INTERPRETER
    return _chip(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    # An unknown chip gets the smallest limit that any has.
    return Chip(capability, properties.multi_processor_count, _SHARED.get(capability, 99) * 1024)


def on(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Within it the tensor's device is the current one: Triton launches on the current stream of the current device."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()  # type: ignore[return-value]


#: Kernels address a tensor in 64 bits, but count its rows, the values of a row and the like in 32, also those of a
#: tile that begins in it and ends past it.
MOST = 2**31 - 2**16


def uncountable(counts: dict[str, int]) -> str | None:
    """What a kernel cannot count, worded to follow "the triton backend"; None where every count by its name is fit."""
    for name, count in counts.items():
        if count > MOST:
            return f"counts {name} up to {MOST}, and here are {count}; split the tensor"
    return None


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value` (and 1)."""
    return 1 << max(0, value - 1).bit_length()
