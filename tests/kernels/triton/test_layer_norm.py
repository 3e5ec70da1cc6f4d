"""layer_norm_quantize by the interpreter against NumPy in float64: scales to 1e-5, codes off only near ties."""

from __future__ import annotations

import math

import pytest
import torch

import qkernels
from qkernels.triton import layer_norm, rows
from tests.kernels.fresh_memory import guarded_codes
from tests.kernels.test_quantize import check_layer_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [2, 31, 77, 300, 768, 1026, 2048, 3000, 8192, 10_248]


def vectors(k: int) -> list[torch.Tensor]:
    """weight, bias, smooth"""
    generator = torch.Generator().manual_seed(k)
    return [torch.randn(k, generator=generator), torch.randn(k, generator=generator), torch.rand(k) + 0.5]


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k)
    weight, bias, smooth = vectors(k)
    x = torch.randn(5, k, generator=generator) * 3
    x[1], x[2, k // 2], x[3, k - 1] = x[1] - 30, math.nan, math.inf
    x = x.to(dtype)
    cases = [(weight, bias, None, None, None), (weight, bias, smooth, 0.02, 5), (None, None, smooth, None, None)]
    for given in cases if k == 300 else cases[k % 2 :: 2]:
        out = guarded_codes(5, k)
        assert qkernels.layer_norm_quantize(x, given[0], given[1], 1e-5, *given[2:], out=out) is out
        check_layer_norm(x, *given, out)


def test_rows_far_from_zero_lose_no_digits() -> None:
    """A mean of 1,000 deviations, and outliers in the chunk that the guess of the mean is from."""
    for k in (768, 12_288):
        weight, bias, _ = vectors(k)
        x = torch.randn(12, k, generator=torch.Generator().manual_seed(0))
        x[:3] += 1000
        x[3:6] -= 300
        x[3:6, [0, 100, k - 1]] = 500.0
        x[6:9] *= 1e-3
        x[9:, :3] = 1e4
        check_layer_norm(x, weight, bias, None, None, None, qkernels.layer_norm_quantize(x, weight, bias, 1e-5))


@pytest.mark.parametrize("k", [1, 40, 120, 768, 1000, 12_289])
def test_rows_of_one_value_are_zero(k: int) -> None:
    """The last two in 120 columns: there the guess is off by a d for which 120 * d * float32(1 / 120) is not d."""
    x = torch.tensor([0.0, 0.1, -1000.3, 3e-20, 7e15, 63.624244689941406, 3.8739383220672607])[:, None].expand(7, k)
    codes, scales = qkernels.layer_norm_quantize(x, torch.ones(k), None, 1e-5)
    assert not codes.any() and (scales == 1).all()


@pytest.mark.parametrize("k", [50, 12_290])
def test_faults_reach_the_scale(k: int) -> None:
    x = torch.randn(6, k)
    x[0, 3], x[1, k - 1], x[3] = math.nan, -math.inf, 0.0
    x[2] = torch.tensor([3e19, -3e19]).repeat(k // 2)  # a variance beyond float32, and a mean of 0
    weight, bias = torch.ones(k), torch.zeros(k)
    codes, scales = qkernels.layer_norm_quantize(x, weight, bias, 1e-5)
    assert scales[:3].isnan().all() and not codes[:3].any()
    assert scales[3] == 1 and not codes[3].any()
    assert scales[4:].isfinite().all() and (codes[4:].abs().amax(1) == 127).all()
    weight[7] = math.nan
    assert qkernels.layer_norm_quantize(x, weight, bias, 1e-5)[1].isnan().all()


def test_shapes_and_strides() -> None:
    x = torch.randn(3, 4, 40)
    weight, bias, _ = vectors(40)
    for view in (x, x[:, 0], x.transpose(0, 1), x[:, :, ::2], x[:0], x[0, 0]):
        w, b = weight[: view.shape[-1]], bias[: view.shape[-1]]
        codes, scales = qkernels.layer_norm_quantize(view, w, b, 1e-5)
        assert codes.shape == view.shape and scales.shape == view.shape[:-1]
        check_layer_norm(
            view.reshape(-1, view.shape[-1]), w, b, None, None, None, (codes.reshape(-1, len(w)), scales.flatten())
        )


def test_programs_go_through_many_rows() -> None:
    tile = rows.row_tile(768, torch.bfloat16)
    assert [layer_norm.steps_of(m, tile, 132) for m in (1, 800, 7000, 16_448)] == [1, 1, 2, 4]
    x = torch.randn(331, 33)  # the interpreter's chip has 3 multiprocessors: steps of 4, and a part of one
    assert layer_norm.steps_of(331, rows.row_tile(33, x.dtype), 3) == 4
    check_layer_norm(
        x, None, None, None, None, None, qkernels.layer_norm_quantize(x, None, None, 1e-5, out=guarded_codes(331, 33))
    )


@pytest.mark.parametrize("width", [40, 20480])
def test_weights_of_16_bits_are_read_as_they_are(width: int) -> None:
    x, weight, bias = torch.randn(3, width), torch.rand(width) + 0.5, torch.randn(width)
    for dtype in (torch.bfloat16, torch.float16):
        halves = weight.to(dtype), bias.to(dtype)
        want = qkernels.layer_norm_quantize(x, *(t.float() for t in halves), 1e-5)
        for got, same in zip(qkernels.layer_norm_quantize(x, *halves, 1e-5), want, strict=True):
            assert torch.equal(got, same)
