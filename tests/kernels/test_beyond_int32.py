"""Tensors of more than 2^31 elements on the CPU. Rows repeat: their pages are mapped again and again, so that memory
holds one period of what is read and of what is written, and every row of a period must come out alike."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qkernels import Int8Weight, cpu, reference
from qkernels.contract import Epilogue

pytestmark = [
    pytest.mark.slow,  # walks over gigabytes
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memfd of Linux"),
    pytest.mark.skipif(cpu.native is None, reason=f"needs the native code: {cpu.missing}"),
]

FAR = 2**31
#: Rows of a period. 2^32 bytes are no whole number of periods: an address that wraps meets other rows.
ROWS = 3 * 1024


class Repeated:
    """`[rows, width]` whose rows i and i + ROWS are the same memory."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self.period = ROWS * width * dtype.itemsize
        assert self.period % mmap.PAGESIZE == 0 and rows % ROWS == 0
        self.size = rows // ROWS * self.period
        libc = self.libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        file = os.memfd_create("repeated")
        os.ftruncate(file, self.period)
        none, both, shared, fixed, anonymous = 0, 3, 1, 0x10, 0x4022  # MAP_NORESERVE | MAP_PRIVATE | MAP_ANONYMOUS
        self.address = libc.mmap(None, self.size, none, anonymous, -1, 0)
        for at in range(0, self.size, self.period):
            found = libc.mmap(self.address + at, self.period, both, shared | fixed, file, 0)
            assert found == self.address + at, os.strerror(ctypes.get_errno())
        os.close(file)
        memory = (ctypes.c_char * self.size).from_address(self.address)
        self.tensor = torch.frombuffer(memory, dtype=dtype).view(rows, width)

    def close(self) -> None:
        del self.tensor
        self.libc.munmap(self.address, self.size)


@pytest.fixture
def repeated() -> Iterator[Any]:
    made: list[Repeated] = []

    def make(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        made.append(Repeated(rows, width, dtype))
        return made[-1].tensor

    yield make
    for one in made:
        one.close()


def sample(width: int, dtype: torch.dtype) -> torch.Tensor:
    x = 30 * torch.randn(ROWS, width, generator=torch.Generator().manual_seed(width))
    return x.clamp(-127, 127).to(dtype)


def test_quantize_per_token(repeated: Any) -> None:
    width = 4096
    rows = -(-FAR // width // ROWS) * ROWS
    x, codes = repeated(rows, width, torch.float16), repeated(rows, width, torch.int8)
    scales = torch.full((rows,), -1.0)
    x[:ROWS], codes[:ROWS] = sample(width, torch.float16), 77
    cpu.quantize_per_token(x, out=(codes, scales))
    want = reference.quantize_per_token(x[:ROWS].clone())
    assert torch.equal(codes[:ROWS], want[0]) and torch.equal(scales.view(-1, ROWS), want[1].expand(rows // ROWS, ROWS))


def test_int8_linear(repeated: Any) -> None:
    n, k = 4096, 16
    rows = -(-FAR // n // ROWS) * ROWS
    x, out = repeated(rows, k, torch.int8), repeated(rows, n, torch.int8)
    scales = torch.full((rows, n // 128), -1.0)
    x[:ROWS], out[:ROWS] = sample(k, torch.int8), 77
    weight = Int8Weight.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0))).pack("vnni64")
    cpu.int8_linear(x, torch.tensor(0.01), weight, Epilogue(out_group=128), out=(out, scales))
    part = cpu.int8_linear(x[:ROWS].clone(), torch.tensor(0.01), weight, Epilogue(out_group=128))
    assert torch.equal(out[:ROWS], part[0])
    assert torch.equal(scales.view(-1, ROWS, n // 128), part[1].expand(rows // ROWS, ROWS, n // 128))
