"""A long-running process can have its heap's holes back, in a process of its own so that nothing else is measured."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

HOLES = """
import torch, qkernels
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20
large = torch.ones(6 * 2**20)
del large  # from now on such sizes come from the heap
held = [torch.ones(2**17) for _ in range(400)]
before = resident()
del held[::2]  # half a megabyte each, and one that stays behind each
holes = resident()
given = qkernels.release_memory()
print(before, holes, resident(), given)
"""
MIXED = """
import random, torch, qkernels
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20
random.seed(0)
weight = qkernels.pack(qkernels.Int8Weight.quantize(torch.randn(1024, 256)))
kept = []
def calls(count):
    for _ in range(count):
        x = torch.randn(random.choice((1, 7, 50, 197, 1600)), 256)
        kept.append(qkernels.int8_linear(*qkernels.quantize_per_token(x), weight, activation="gelu")[:1].clone())
        if len(kept) > 40:
            del kept[random.randrange(40)]
calls(60)
qkernels.release_memory()
before = resident()
calls(300)
after = resident()
print(before, after, (qkernels.release_memory(), resident())[1])
"""


def run(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc's malloc_trim")
def test_holes_are_given_back() -> None:
    before, holes, after, given = run(HOLES)
    assert int(holes) > int(before) - 50, "no holes were made"
    assert int(after) < int(before) - 80 and given == "True"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc's malloc_trim")
def test_mixed_calls_leave_nothing_behind() -> None:
    before, _, after = map(int, run(MIXED))
    assert after < before + 40
