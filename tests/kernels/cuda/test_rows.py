"""quantize_per_token and layer_norm_quantize of csrc/cuda, emulated, against the reference: bit for bit, but for steps
near ties behind a LayerNorm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qkernels import reference
from tests.kernels.fresh_memory import guarded_codes
from tests.kernels.oracles import FLOATS, assert_near_ties, f64, layer_norm

# Around the widths where another kernel takes over (768, 1024, 1280, 5120, 20,480), and what vectors do not divide.
WIDTHS = [1, 7, 8, 31, 96, 257, 760, 768, 769, 776, 1024, 1280, 1283, 1288, 4099, 5120, 5128]
LONG = [20480, 20483, 20488]


def sample(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of normal values, and where there are enough of them rows with each kind of trouble."""
    generator = torch.Generator().manual_seed(rows * width)
    x = torch.randn(rows, width, generator=generator)
    specials = [0.0, math.nan, math.inf, -math.inf, 1e-38, 2.0**-101, 2.0**-100, 1e-45, 3e38, 65000.0]
    for row, special in zip(x[1:], specials, strict=False):
        if abs(special) < 1:
            row.zero_()
        row[int(torch.randint(width, (), generator=generator))] = special
    return x.to(dtype)


def assert_equal(got: Any, want: Any) -> None:
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].nan_to_num(-1.0), want[1].nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_codes_are_the_reference_s_bit_for_bit(emulated: Any, width: int, dtype: torch.dtype) -> None:
    x = sample(12 if width < 1000 else 4, width, dtype)
    smooth = torch.rand(width, generator=torch.Generator().manual_seed(width)) + 0.5
    zero = torch.tensor(-3.0)
    for arguments in (
        (None, None, None),
        (smooth, None, None),
        (None, torch.tensor(0.013), None),
        (smooth, torch.tensor(0.013), zero),
        (None, torch.tensor(7e-39), None),  # its reciprocal is infinite
        (None, torch.tensor(1e-30), torch.tensor(127.0)),
    ):
        out = guarded_codes(*x.shape)
        assert emulated.quantize_per_token(x, *arguments, out=out) is out
        assert_equal(out, reference.quantize_per_token(x, *arguments))


@pytest.mark.parametrize("width", LONG)
def test_rows_that_no_register_holds(emulated: Any, width: int) -> None:
    x = sample(2, width, torch.bfloat16)
    x[1, -1] = math.nan
    assert_equal(emulated.quantize_per_token(x), reference.quantize_per_token(x))
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(1)) + 3
    codes, scales = emulated.layer_norm_quantize(x, None, None, 1e-5)
    y = layer_norm(f64(x), None, None, 1e-5)
    assert_near_ties(codes, y / (abs(y).max(-1, keepdims=True) / 127), 2e-3)


def test_ties_go_to_the_even_code(emulated: Any) -> None:
    halves = torch.cat([torch.arange(-126.5, 127.0), torch.tensor([127.0])])
    assert_equal(emulated.quantize_per_token(halves), reference.quantize_per_token(halves))
    assert emulated.quantize_per_token(halves)[0][:4].tolist() == [-126, -126, -124, -124]
    # The zero point comes after the rounding.
    assert_equal(
        emulated.quantize_per_token(halves, None, torch.tensor(1.0), torch.tensor(1.0)),
        reference.quantize_per_token(halves, None, torch.tensor(1.0), torch.tensor(1.0)),
    )


def test_views_that_begin_off_a_vector(emulated: Any) -> None:
    base = torch.randn(3 * 64 + 3)
    x = base[3:].view(3, 64)
    assert x.data_ptr() % 16
    assert_equal(emulated.quantize_per_token(x), reference.quantize_per_token(x))
    smooth = torch.rand(65)[1:]
    y = torch.randn(3, 64)
    assert_equal(emulated.quantize_per_token(y, smooth), reference.quantize_per_token(y, smooth))
    assert_equal(emulated.quantize_per_token(y.t()), reference.quantize_per_token(y.t()))


def test_no_rows(emulated: Any) -> None:
    codes, scales = emulated.quantize_per_token(torch.ones(0, 8))
    assert codes.shape == (0, 8) and scales.shape == (0,)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_is_right_but_for_ties(emulated: Any, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(6, width, generator=generator)
    x[1] += 1000  # a mean far from 0 must cost no digits of the variance
    x[2] = 5.0  # no variance
    x[3, 0] = 50.0
    x = x.to(dtype)
    weight, bias = torch.rand(width, generator=generator) + 0.5, torch.randn(width, generator=generator) * 0.1
    smooth = torch.rand(width, generator=generator) + 0.5
    scale, zero = torch.tensor(0.03), torch.tensor(5.0)
    for w, b, s, static in ((weight, bias, None, False), (None, None, None, False), (weight, bias, smooth, True)):
        out = guarded_codes(*x.shape)
        emulated.layer_norm_quantize(x, w, b, 1e-5, s, scale if static else None, zero if static else None, out=out)
        y = layer_norm(f64(x), None if w is None else f64(w), None if b is None else f64(b), 1e-5)
        y = y if s is None else y * f64(s)
        want = reference.layer_norm_quantize(x, w, b, 1e-5, s, scale if static else None, zero if static else None)
        torch.testing.assert_close(out[1], want[1], rtol=1e-5, atol=0)
        # 1e-5 of a value, at most 127 steps; and where the row has no variance, of the rounding of its mean.
        assert_near_ties(out[0], y / f64(want[1])[:, None] + (5.0 if static else 0.0), 127e-5 + 1e-3)


def test_weights_of_16_bits(emulated: Any) -> None:
    x, weight, bias = torch.randn(3, 40), (torch.rand(40) + 0.5).bfloat16(), torch.randn(40).half()
    assert_equal(
        emulated.layer_norm_quantize(x, weight, bias, 1e-5),
        emulated.layer_norm_quantize(x, weight.float(), bias.float(), 1e-5),
    )


def test_statistics_that_leave_float32_are_a_fault(emulated: Any) -> None:
    x = torch.randn(4, 48)
    x[0] *= 1e30
    x[1, 3] = math.inf
    x[2, 5] = math.nan
    codes, scales = emulated.layer_norm_quantize(x, None, None, 1e-5)
    assert scales[:3].isnan().all() and (codes[:3] == 0).all() and scales[3] > 0
