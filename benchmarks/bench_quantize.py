"""Quantization of activations, with and without the LayerNorm before it; beside torch's LayerNorm alone."""

from __future__ import annotations

import pytest
import torch

import qkernels
from qkernels import reference

SHAPES = [(800, 768), (50, 768), (800, 3072), (2056, 1024)]


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
def test_torch_layer_norm(benchmark, generator, rows: int, width: int) -> None:
    benchmark.group = f"quantize {rows}x{width}"
    x = torch.randn(rows, width, generator=generator)
    benchmark(torch.nn.functional.layer_norm, x, (width,))
