"""Fake quantization, forward and backward, by estimator."""

from __future__ import annotations

import pytest
import torch

import qkernels


@pytest.mark.parametrize("estimator", ["ste", "lsq"])
def test_fake_quantize(benchmark, generator, estimator: str) -> None:
    benchmark.group = "fake_quantize 800x3072"
    x = torch.randn(800, 3072, generator=generator, requires_grad=True)
    scale = torch.tensor(0.02, requires_grad=estimator == "lsq")

    def both() -> torch.Tensor:
        y = qkernels.fake_quantize(x, scale, 0, -128, 127, estimator)
        x.grad = scale.grad = None
        y.sum().backward()
        return y

    y = benchmark(both)
    assert x.grad is not None and (y - x.clamp(-2.56, 2.54)).abs().max() <= 0.0101
