"""INT4 linear layer in groups of 128, with INT8 (W4A8) and with float32 activations (W4A16)."""

from __future__ import annotations

import pytest
import torch

import qkernels
from benchmarks.shapes import LINEAR
from qkernels import Int4Weight, reference


@pytest.mark.parametrize("m, n, k", LINEAR)
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_int4_linear(benchmark, rate, generator, activations: str, m: int, n: int, k: int) -> None:
    benchmark.group = f"linear {m}x{n}x{k}"
    x, scale = torch.randn(m, k, generator=generator), None
    if activations == "int8":
        x, scale = qkernels.quantize_per_token(x)
    canonical = Int4Weight.quantize(torch.randn(n, k, generator=generator), group=128)
    weight = canonical.pack()
    found = benchmark(qkernels.int4_linear, x, scale, weight)
    torch.testing.assert_close(found, reference.int4_linear(x, scale, canonical), rtol=1e-4, atol=1e-3)
    rate(2.0 * m * n * k)
