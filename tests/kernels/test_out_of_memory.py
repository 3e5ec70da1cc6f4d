"""What a kernel throws on a thread of its own reaches Python: here, more memory than any machine has."""

from __future__ import annotations

import faulthandler
from typing import Any

import pytest
import torch

import qkernels
from qkernels import cpu
from qkernels.recording import tiling

pytestmark = pytest.mark.skipif(cpu.native is None, reason=f"needs the native kernels: {cpu.missing}")

HUGE = 2**57  # values: their bytes are no address, whatever the system promises
SIZES = {  # enough work for several threads, which ask for their memory before they touch any
    "quantize_patches": {"batch": 1, "rows": 6, "columns": 1, "channels": 1, "height": 1, "width": HUGE},
    "attention": {"batch": 6, "heads": 1, "queries": 1, "keys": 1, "d": HUGE // 64},
}


def arguments(name: str, sizes: dict[str, int], threads: int) -> list[Any]:
    names = [part.split()[-1].lstrip("*") for part in cpu.native.module.parameters(name)[0].split(",")]
    return [{**sizes, "threads": threads}.get(n, 0) for n in names]


def expect_the_same_as_ever() -> None:
    x = torch.linspace(-3, 3, 64 * 512).view(64, 512)
    codes, scales = qkernels.quantize_per_token(x)
    expected = qkernels.reference.quantize_per_token(x)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", SIZES)
def test_op(name: str, threads: int) -> None:
    for _ in range(2):
        with pytest.raises(MemoryError):
            getattr(cpu.native, name)(*arguments(name, SIZES[name], threads))
        expect_the_same_as_ever()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tiles(threads: int) -> None:
    """Whoever waits for a tile that failed goes on."""
    tape = cpu.native.Tape()
    for segment, bounds in enumerate(([0, 6], range(7), range(7))):
        tape.append("quantize_patches", arguments("quantize_patches", SIZES["quantize_patches"], 1))
        tape.segment(segment, segment + 1, 1, list(bounds), [(segment, 2, tiling.COUNT, 1)])
    faulthandler.dump_traceback_later(60, exit=True)
    for _ in range(2):
        with pytest.raises(MemoryError):
            tape.play(0, 3, threads, 0)
        expect_the_same_as_ever()
    faulthandler.cancel_dump_traceback_later()
