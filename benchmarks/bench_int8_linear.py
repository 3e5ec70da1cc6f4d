"""INT8 linear layer: codes in, float32 out, per-channel scales, bias and GELU fused; beside oneDNN and torch's float32.

`python -m benchmarks.bench_int8_linear` prints a table of CPU time on one thread, with the geometric mean against
oneDNN, on the tier that `QKERNELS_CPU_TIER` names (`ONEDNN_MAX_CPU_ISA=AVX2` holds oneDNN to `avx2`). The function of
the backend is timed: torch's dispatch around an op costs some 40 us, which a `Program` skips.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.paired import paired
from benchmarks.shapes import LINEAR
from qkernels import Int8Weight, cpu, reference
from qkernels.contract import Epilogue

ACTIVATIONS = [None, "gelu"]


def case(m: int, n: int, k: int, activation: str | None) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Tensor]:
    """Ours and oneDNN's `qlinear_pointwise` on the same codes (oneDNN knows one scale for all rows), and the result."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    weight, bias = Int8Weight.quantize(torch.randn(n, k, generator=generator)), torch.randn(n, generator=generator)
    packed, scale, out = weight.pack("vnni64"), torch.tensor(0.02), torch.empty(m, n)
    shifted, zeros = x.view(torch.uint8) ^ 128, torch.zeros(n, dtype=torch.int64)
    theirs = torch.ops.onednn.qlinear_prepack(weight.codes, [m, k])
    post = (activation, [], "none") if activation else ("none", [], "")

    epilogue = Epilogue(bias, activation)

    def onednn() -> Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            shifted, 0.02, 128, theirs, weight.scales, zeros, bias, 1.0, 0, torch.float32, *post
        )

    def ours() -> Tensor:
        return cpu.int8_linear(x, scale, packed, epilogue, out=out)

    return ours, onednn, reference.int8_linear(x, scale, weight, epilogue)


@pytest.mark.parametrize("m, n, k", LINEAR)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("which", ["ours", "onednn"])
def test_int8_linear(benchmark, rate, which: str, activation: str | None, m: int, n: int, k: int) -> None:
    benchmark.group = f"linear {m}x{n}x{k} {activation}"
    ours, onednn, want = case(m, n, k, activation)
    found = benchmark(ours if which == "ours" else onednn)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-4)
    rate(2.0 * m * n * k)


@pytest.mark.parametrize("m, n, k", LINEAR)
def test_torch_float32(benchmark, rate, generator, m: int, n: int, k: int) -> None:
    benchmark.group = f"linear {m}x{n}x{k} None"
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    benchmark(torch.nn.functional.linear, x, weight, torch.randn(n, generator=generator))
    rate(2.0 * m * n * k)


def main() -> None:
    torch.set_num_threads(1)
    cpu.use_tier(os.environ.get("QKERNELS_CPU_TIER"))
    ratios: dict[str | None, list[float]] = {activation: [] for activation in ACTIVATIONS}
    print(f"{'% of peak':18}" + "".join(f"{a or 'plain':>8}{'oneDNN':>8}{'ratio':>7}" for a in ACTIVATIONS))
    for m, n, k in LINEAR:
        line = f"{m}x{n}x{k}".ljust(18)
        for activation in ACTIVATIONS:
            ours, onednn, _ = case(m, n, k, activation)
            seconds = paired({"ours": ours, "onednn": onednn})
            ideal, ratio = 2 * m * n * k / seconds["peak"], seconds["onednn"] / seconds["ours"]
            ratios[activation].append(ratio)
            line += f"{100 * ideal / seconds['ours']:8.1f}{100 * ideal / seconds['onednn']:8.1f}{ratio:7.2f}"
        print(line, flush=True)
    for activation, values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        print(f"geometric mean against oneDNN, {activation or 'plain'}: {mean:.3f}")


if __name__ == "__main__":
    main()
