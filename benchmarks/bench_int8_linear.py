"""INT8 linear layer: codes in, float32 out, per-channel scales and bias fused; beside torch's float32."""

from __future__ import annotations

import pytest
import torch

import qkernels
from benchmarks.shapes import LINEAR
from qkernels import Int8Weight, reference


@pytest.mark.parametrize("m, n, k", LINEAR)
def test_int8_linear(benchmark, rate, generator, m: int, n: int, k: int) -> None:
    benchmark.group = f"linear {m}x{n}x{k}"
    x, scale = qkernels.quantize_per_token(torch.randn(m, k, generator=generator))
    canonical = Int8Weight.quantize(torch.randn(n, k, generator=generator))
    weight, bias = canonical.pack(), torch.randn(n, generator=generator)
    found = benchmark(qkernels.int8_linear, x, scale, weight, bias)
    torch.testing.assert_close(found, reference.int8_linear(x, scale, canonical, bias), rtol=1e-5, atol=1e-4)
    rate(2.0 * m * n * k)


@pytest.mark.parametrize("m, n, k", LINEAR)
def test_torch_float32(benchmark, rate, generator, m: int, n: int, k: int) -> None:
    benchmark.group = f"linear {m}x{n}x{k}"
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    benchmark(torch.nn.functional.linear, x, weight, torch.randn(n, generator=generator))
    rate(2.0 * m * n * k)
