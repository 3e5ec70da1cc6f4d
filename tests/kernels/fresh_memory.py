"""Fresh memory as the worst that an op may find: full of poison, and for `out=` between guard bands.

An op that leaves a part of its result unwritten then returns poison, and one that writes beside its output is found out
when the test ends: `tests/kernels/conftest.py` does both for every test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

BAND = 128  # elements on either side of an output
#: Poison by the bytes of an element: as floats NaN, and none that arithmetic or a comparison makes.
POISON = {
    1: (torch.int8, -0x5B),
    2: (torch.int16, 0x7FE5),
    4: (torch.int32, 0x7FE5A5A5),
    8: (torch.int64, 0x7FF5A5A5A5A5A5A5),
}


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialized holds NaN, or the largest integer, inside."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills only while this is on
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass
class Guarded:
    """An output inside a buffer that was full of poison."""

    buffer: Tensor
    output: Tensor

    def fault(self) -> str | None:
        """What became of the memory, if it is not as it should be."""
        word, poison = POISON[self.buffer.itemsize]
        same = self.buffer.view(word) == poison
        inside = torch.zeros_like(same)
        start = self.output.storage_offset()
        inside.as_strided(self.output.shape, self.output.stride(), start).fill_(True)
        what = f"an output {list(self.output.shape)} of {self.output.dtype}"
        if hit := (~same & ~inside).nonzero().flatten().tolist():
            return f"{len(hit)} elements beside {what} were written, the first {hit[0] - start} from its start"
        if self.output.is_floating_point() and (left := int((same & inside).sum())):
            return f"{left} elements of {what} were never written"
        return None


_made: list[Guarded] = []


def guarded(shape: tuple[int, ...], dtype: torch.dtype, gap: int = 0, shift: int = 0) -> Tensor:
    """A poisoned tensor to be given as `out=`: all of it must be written, if it holds floats, and nothing around it.

    gap: elements between two rows, which belong to the band. shift: elements by which it begins off alignment.
    """
    lead, k = shape[:-1], shape[-1] if shape else 1
    size = math.prod(lead) * (k + gap)
    word, poison = POISON[dtype.itemsize]
    buffer = torch.full((size + 2 * BAND,), poison, dtype=word).view(dtype)
    rows = buffer[BAND + shift : BAND + shift + size].view(*lead, k + gap)[..., :k]
    _made.append(Guarded(buffer, rows.view(shape)))
    return _made[-1].output


def guarded_codes(*shape: int) -> tuple[Tensor, Tensor]:
    """`out=` of a quantizer: int8 codes [*shape], and a float32 scale per row."""
    return guarded(shape, torch.int8), guarded(shape[:-1], torch.float32)


def forget() -> None:
    """Outputs made so far may stay as they are."""
    _made.clear()


def check() -> None:
    """Fails where an op wrote beside an output made since the last check, or left a part of it out."""
    faults = [fault for each in _made if (fault := each.fault())]
    forget()
    assert not faults, faults[0] + (f" (the first of {len(faults)} faults)" if len(faults) > 1 else "")
