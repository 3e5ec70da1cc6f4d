"""The orthonormal Hadamard transform, widths that transformers have."""

from __future__ import annotations

import pytest
import torch

import qkernels


@pytest.mark.parametrize("width", [512, 768, 1024, 3072])
def test_hadamard_transform(benchmark, generator, width: int) -> None:
    benchmark.group = f"hadamard 800x{width}"
    x = torch.randn(800, width, generator=generator)
    y = benchmark(qkernels.hadamard_transform, x)
    torch.testing.assert_close(qkernels.hadamard_transform(y, transpose=True), x, rtol=1e-4, atol=1e-5)
