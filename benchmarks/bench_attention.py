"""Attention with float32 and bfloat16 input: the same type out, and INT8 out by the dynamic rule; beside torch's."""

from __future__ import annotations

import pytest
import torch

import qkernels

# B, L, H, d, causal: the towers of ViT-B/32 (image, and text), ViT-B/16, ViT-L/14, SigLIP at 384 pixels
SHAPES = [
    (16, 50, 12, 64, False),
    (1, 50, 12, 64, False),
    (8, 77, 8, 64, True),
    (8, 197, 12, 64, False),
    (4, 257, 16, 64, False),
    (1, 577, 12, 64, False),
    (1, 729, 16, 72, False),
]
DTYPES = [torch.float32, torch.bfloat16]
cases = pytest.mark.parametrize("shape", SHAPES, ids=str)
types = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def qkv(shape: tuple, dtype: torch.dtype, generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(*shape[:4], generator=generator).to(dtype) for _ in range(3)]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    heads = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2)


@types
@cases
def test_attention(benchmark, generator, shape: tuple, dtype: torch.dtype) -> None:
    benchmark.group = f"attention {shape} {dtype}"
    inputs, causal = qkv(shape, dtype, generator), shape[4]
    found = benchmark(qkernels.attention, *inputs, causal=causal).float()
    wanted = plain(*(t.float() for t in inputs), causal)
    assert (found - wanted).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * wanted.norm()


@types
@cases
def test_attention_int8(benchmark, generator, shape: tuple, dtype: torch.dtype) -> None:
    benchmark.group = f"attention {shape} {dtype}"
    inputs, causal = qkv(shape, dtype, generator), shape[4]
    codes, scale = benchmark(qkernels.attention, *inputs, causal=causal, out_dynamic=True)
    wanted = plain(*(t.float() for t in inputs), causal).flatten(2)
    assert (codes.float().flatten(2) * scale[..., None] - wanted).abs().amax() <= 1.01 * scale.max()


@types
@cases
def test_torch(benchmark, generator, shape: tuple, dtype: torch.dtype) -> None:
    benchmark.group = f"attention {shape} {dtype}"
    benchmark(plain, *qkv(shape, dtype, generator), shape[4])
