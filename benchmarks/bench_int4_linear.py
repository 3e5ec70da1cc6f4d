"""INT4 linear layer in groups of 128, with INT8 (W4A8) and with float32 activations (W4A16).

`python -m benchmarks.bench_int4_linear` prints a table of CPU time on one thread beside the INT8 layer, and for few
rows the bytes of weights that are read per second.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.paired import paired
from benchmarks.shapes import FEW_ROWS, LINEAR
from qkernels import Int4Weight, Int8Weight, cpu, quantize_per_token, reference


@pytest.mark.parametrize("m, n, k", LINEAR + FEW_ROWS)
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_int4_linear(benchmark, rate, generator, activations: str, m: int, n: int, k: int) -> None:
    benchmark.group = f"linear {m}x{n}x{k}"
    x, scale = torch.randn(m, k, generator=generator), None
    if activations == "int8":
        x, scale = quantize_per_token(x)
    canonical = Int4Weight.quantize(torch.randn(n, k, generator=generator), group=128)
    weight, out = canonical.pack("nibble64"), torch.empty(m, n)
    found = benchmark(lambda: cpu.int4_linear(x, scale, weight, out=out))
    torch.testing.assert_close(found, reference.int4_linear(x, scale, canonical), rtol=1e-4, atol=1e-3)
    rate(2.0 * m * n * k)


def main() -> None:
    torch.set_num_threads(1)
    print(
        f"{'% of VNNI peak':18}{'INT8':>7}{'W4A8':>7}{'x INT8':>8}{'W4A16 ms':>10}   GB/s of weights: INT8, W4A8, W4A16"
    )
    for m, n, k in LINEAR + FEW_ROWS:
        generator = torch.Generator().manual_seed(0)
        x, scale = quantize_per_token(torch.randn(m, k, generator=generator))
        floats, matrix = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
        int8, int4 = Int8Weight.quantize(matrix).pack("vnni64"), Int4Weight.quantize(matrix, 128).pack("nibble64")
        out = torch.empty(m, n)
        functions = {
            "int8": lambda x=x, w=int8, s=scale, y=out: cpu.int8_linear(x, s, w, out=y),
            "w4a8": lambda x=x, w=int4, s=scale, y=out: cpu.int4_linear(x, s, w, out=y),
        }
        if m <= 4:
            functions["w4a16"] = lambda x=floats, w=int4, y=out: cpu.int4_linear(x, None, w, out=y)
        seconds = paired(functions)
        ideal = 2 * m * n * k / seconds["peak"]
        line = f"{m}x{n}x{k}".ljust(18) + "".join(f"{100 * ideal / seconds[name]:7.1f}" for name in ("int8", "w4a8"))
        line += f"{seconds['int8'] / seconds['w4a8']:8.2f}"
        if m <= 4:
            rates = [n * k / 1e9 / seconds["int8"], *(n * k / 2e9 / seconds[name] for name in ("w4a8", "w4a16"))]
            line += f"{1e3 * seconds['w4a16']:10.2f}   " + ", ".join(f"{value:.1f}" for value in rates)
        print(line, flush=True)


if __name__ == "__main__":
    main()
