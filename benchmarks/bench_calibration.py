"""The per-channel maximum that calibration streams through."""

from __future__ import annotations

import torch

import qkernels


def test_channel_absmax(benchmark, generator) -> None:
    benchmark.group = "channel_absmax 6400x3072"
    x = torch.randn(6400, 3072, generator=generator)
    assert torch.equal(benchmark(qkernels.channel_absmax, x), x.abs().amax(0))


def test_torch(benchmark, generator) -> None:
    benchmark.group = "channel_absmax 6400x3072"
    x = torch.randn(6400, 3072, generator=generator)
    benchmark(lambda: x.abs().amax(0))
