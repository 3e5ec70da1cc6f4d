"""Quantization of activations, with and without the LayerNorm before it, and of patches; beside torch's LayerNorm
alone, torch's way to patches, and a copy of as many bytes."""

from __future__ import annotations

import pytest
import torch

import qkernels
from qkernels import reference

SHAPES = [(800, 768), (50, 768), (800, 3072), (2056, 1024)]
PATCHES = [(1, 32), (16, 32), (8, 16), (8, 14)]


def agree(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert (found[0].int() - wanted[0].int()).abs().max() <= 1  # one step at a tie
    torch.testing.assert_close(found[1], wanted[1])


@pytest.mark.parametrize("rows, width", SHAPES)
def test_quantize_per_token(benchmark, generator, rows: int, width: int) -> None:
    benchmark.group = f"quantize {rows}x{width}"
    x = torch.randn(rows, width, generator=generator)
    agree(benchmark(qkernels.quantize_per_token, x), reference.quantize_per_token(x))


@pytest.mark.parametrize("rows, width", SHAPES)
def test_layer_norm_quantize(benchmark, generator, rows: int, width: int) -> None:
    benchmark.group = f"quantize {rows}x{width}"
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(width, generator=generator)
    arguments = x, weight, torch.zeros(width), 1e-5
    agree(benchmark(qkernels.layer_norm_quantize, *arguments), reference.layer_norm_quantize(*arguments))


@pytest.mark.parametrize("rows, width", SHAPES)
def test_copy(benchmark, generator, rows: int, width: int) -> None:
    benchmark.group = f"quantize {rows}x{width}"
    x = torch.randn(rows * width * 5 // 8, generator=generator)  # four bytes read and one written for each value
    benchmark(torch.empty_like(x).copy_, x)


def cut(x: torch.Tensor, patch: int) -> torch.Tensor:
    batch, channels, size, _ = x.shape
    side = size // patch
    x = x.view(batch, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, side * side, channels * patch * patch)


@pytest.mark.parametrize("batch, patch", PATCHES)
def test_quantize_patches(benchmark, generator, batch: int, patch: int) -> None:
    benchmark.group = f"patches {batch}x3x224x224 of {patch}"
    x = torch.randn(batch, 3, 224, 224, generator=generator)
    agree(benchmark(qkernels.quantize_patches, x, patch), reference.quantize_patches(x, patch, patch))


@pytest.mark.parametrize("batch, patch", PATCHES)
def test_torch_patches_then_quantize(benchmark, generator, batch: int, patch: int) -> None:
    benchmark.group = f"patches {batch}x3x224x224 of {patch}"
    x = torch.randn(batch, 3, 224, 224, generator=generator)
    benchmark(lambda: qkernels.quantize_per_token(cut(x, patch)))


@pytest.mark.parametrize("rows, width", SHAPES)
def test_torch_layer_norm(benchmark, generator, rows: int, width: int) -> None:
    benchmark.group = f"quantize {rows}x{width}"
    x = torch.randn(rows, width, generator=generator)
    benchmark(torch.nn.functional.layer_norm, x, (width,))
