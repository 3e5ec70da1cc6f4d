"""Linear layers of fewer bits beside INT8, all with INT8 activations: 7, 6 and 5 bits per channel (`int8_linear`), 4
bits per channel and in groups of 128 and 32 (`int4_linear`).

`python -m benchmarks.bench_few_bits [--threads N]` prints operations per second of INT8 and how many times as fast the
others are, and their geometric means for M >= 50. One thread is timed by CPU time, several by the clock, on a machine
that must then be quiet. `QKERNELS_CPU_TIER=avx2` holds it to AVX2, where fewer bits have kernels of their own; on other
tiers 5 to 7 bits run in the INT8 product.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.paired import paired
from benchmarks.shapes import FEW_ROWS, LINEAR
from qkernels import Int8Weight, cpu, pack, quantize_per_token
from qkernels.dispatch import info
from qkernels.grids import Grid
from qkernels.weights import quantize_weight

GRIDS = {
    "INT8": Grid(8),
    "W7": Grid(7),
    "W6": Grid(6),
    "W5": Grid(5),
    "W4": Grid(4, "symfull"),
    "W4 g128": Grid(4, "symfull", 128),
    "W4 g32": Grid(4, "symfull", 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    print(f"tier {info()['tier']}, {threads} threads, peak {cpu.peak_gops():.0f} GOPS")
    print(f"{'GOPS; times INT8':18}" + "".join(f"{name:>9}" for name in GRIDS))
    ratios: dict[str, list[float]] = {name: [] for name in GRIDS}
    for m, n, k in LINEAR + FEW_ROWS:
        generator = torch.Generator().manual_seed(0)
        x, scale = quantize_per_token(torch.randn(m, k, generator=generator))
        matrix, out = torch.randn(n, k, generator=generator), torch.empty(m, n)
        functions: dict[str, Callable[[], Any]] = {}
        for name, grid in GRIDS.items():
            weight = pack(quantize_weight(matrix, grid))
            op = cpu.int8_linear if isinstance(weight, Int8Weight) else cpu.int4_linear
            functions[name] = lambda op=op, w=weight, x=x, s=scale, y=out: op(x, s, w, out=y)
        seconds = paired(functions, clock=time.thread_time if threads == 1 else time.perf_counter)
        line = f"{m}x{n}x{k}".ljust(18) + f"{2e-9 * m * n * k / seconds['INT8']:9.1f}"
        for name in list(GRIDS)[1:]:
            ratio = seconds["INT8"] / seconds[name]
            line += f"{ratio:9.2f}"
            if m >= 50:
                ratios[name].append(ratio)
        print(line, flush=True)
    means = {name: math.exp(sum(map(math.log, each)) / len(each)) for name, each in ratios.items() if each}
    print("geometric means, M >= 50: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()))


if __name__ == "__main__":
    main()
