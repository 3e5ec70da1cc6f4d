"""Attention with float32 input: float32 out, and INT8 out by the dynamic rule; beside torch's."""

from __future__ import annotations

import pytest
import torch

import qkernels

SHAPES = [(16, 50, 12, 64), (1, 50, 12, 64), (8, 197, 12, 64), (64, 16, 8, 64)]  # B, L, H, d


def qkv(shape: tuple[int, ...], generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(*shape, generator=generator) for _ in range(3)]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(benchmark, generator, shape: tuple[int, ...]) -> None:
    benchmark.group = f"attention {shape}"
    q, k, v = qkv(shape, generator)
    torch.testing.assert_close(benchmark(qkernels.attention, q, k, v), plain(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_int8(benchmark, generator, shape: tuple[int, ...]) -> None:
    benchmark.group = f"attention {shape}"
    q, k, v = qkv(shape, generator)
    codes, scale = benchmark(qkernels.attention, q, k, v, out_dynamic=True)
    wanted = plain(q, k, v).flatten(2)
    assert (codes.float().flatten(2) * scale[..., None] - wanted).abs().amax() <= 0.51 * scale.max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_float32(benchmark, generator, shape: tuple[int, ...]) -> None:
    benchmark.group = f"attention {shape}"
    benchmark(plain, *qkv(shape, generator))
