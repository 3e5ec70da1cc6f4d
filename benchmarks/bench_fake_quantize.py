"""Fake quantization, forward and backward, by estimator."""

from __future__ import annotations

import pytest
import torch

import qkernels


@pytest.mark.parametrize("estimator", ["ste", "lsq", "lsq_plus", "ewgs", "pact", "dorefa"])
def test_fake_quantize(benchmark, generator, estimator: str) -> None:
    benchmark.group = "fake_quantize 800x3072"
    x = torch.rand(800, 3072, generator=generator, requires_grad=True)
    learned = estimator in ("lsq", "lsq_plus", "ewgs", "pact")
    scale = torch.tensor(1 / 300 if learned else 1 / 255, requires_grad=learned)
    offset = torch.tensor(0.01, requires_grad=True) if estimator in ("lsq_plus", "ewgs") else None
    delta = 0.001 if estimator == "ewgs" else 0.0

    def both() -> torch.Tensor:
        y = qkernels.fake_quantize(x, scale, offset, 0, 255, estimator, delta=delta)
        x.grad = scale.grad = None
        y.sum().backward()
        return y

    y, low = benchmark(both), 0.0 if offset is None else offset.item()
    step = scale.item()
    assert x.grad is not None and (y - x.clamp(low, low + 255 * step)).abs().max() <= 0.5001 * step
