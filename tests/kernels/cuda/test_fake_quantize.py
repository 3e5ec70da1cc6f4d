"""fake_quantize of csrc/cuda, emulated, against the reference: values bit for bit, gradients to their contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qkernels import reference
from qkernels.contract import ESTIMATORS, OFFSET
from tests.kernels.oracles import FLOATS

# shape, axis, group: one scale, rows, columns, an axis between, groups; pieces of 1024 and blocks of 64 rows and their
# neighbours; widths that vectors do not divide.
SHARING = [
    ((), None, None),
    ((7,), None, None),
    ((3, 1024), None, None),
    ((1, 1025), None, None),
    ((5, 37), 0, None),
    ((6, 64), 0, None),
    ((3, 2056), 0, None),
    ((5, 37), 1, None),
    ((130, 3), 1, None),
    ((65, 264), 1, None),
    ((2, 5, 9), 1, None),
    ((2, 3, 16), 1, None),
    ((9,), 0, None),
    ((3, 100), None, 32),
    ((5, 96), None, 32),
    ((2, 3, 16), None, 16),
    ((3, 32), None, 12),
    ((2, 10), None, 128),
    ((4, 384), None, 128),
    ((0, 6), 1, None),
    ((4, 0), None, None),
]
IDS = [f"{shape}-axis={axis}-group={group}" for shape, axis, group in SHARING]


def case(how: Any, dtype: torch.dtype, estimator: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Any]:
    shape, axis, group = how
    generator = torch.Generator().manual_seed(seed)
    wanted = () if axis is None else (shape[axis],)
    if group is not None:
        wanted = (*shape[:-1], -(-shape[-1] // group))
    scale = torch.rand(wanted, generator=generator) * 0.4 + 0.05
    zero: torch.Tensor | None = None
    if estimator in OFFSET:
        zero = torch.randn(wanted, generator=generator) * 0.3
    elif estimator in ("ste", "lsq"):
        zero = torch.randint(-3, 4, wanted, generator=generator).float()
    x = torch.randn(shape, generator=generator) * 2
    if x.numel() > 20:  # ties
        x.view(-1)[: x.numel() // 2] = torch.round(x.view(-1)[: x.numel() // 2] * 8) / 8
        scale = torch.where(torch.rand(wanted, generator=generator) < 0.5, 0.25, scale)
    return x.to(dtype), scale, zero


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", SHARING, ids=IDS)
def test_values_are_the_reference_s_bit_for_bit(emulated: Any, how: Any, estimator: str) -> None:
    for dtype in FLOATS:
        x, scale, zero = case(how, dtype, estimator)
        if x.numel() > 20:
            x.view(-1)[:4] = torch.tensor([math.nan, math.inf, -math.inf, 6e4])
        arguments = (scale, zero, -8, 7, estimator, *how[1:])
        out = torch.full_like(x, 77)
        assert emulated.fake_quantize(x, *arguments, out=out) is out
        want = reference.fake_quantize(x, *arguments)
        assert torch.equal(out.nan_to_num(1e3), want.nan_to_num(1e3))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", SHARING, ids=IDS)
def test_gradients(emulated: Any, how: Any, estimator: str) -> None:
    for dtype in FLOATS:
        x, scale, zero = case(how, dtype, estimator, 1)
        g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        arguments = (scale, zero, -8, 7, estimator, *how[1:], 0.7, 0.3 if estimator == "ewgs" else 0.0)
        want = reference.fake_quantize_backward(g, x, *arguments)
        out = tuple(torch.full_like(part, 77) for part in want)
        assert emulated.fake_quantize_backward(g, x, *arguments, out=out) is out
        if estimator == "ewgs":  # computed in float32, and rounded to x's type
            torch.testing.assert_close(out[0], want[0], rtol=1e-5 if dtype == torch.float32 else 2.0**-7, atol=1e-6)
        else:
            assert torch.equal(out[0], want[0])
        # Each of the N terms of a sum is at most 12 |g| (codes and offsets within 8 + 3 + 0.5), and is rounded a few
        # times in float32: 1e-5 of their magnitudes is what the contract allows.
        size = float(g.float().abs().sum()) * 12 + 1e-6
        for got, exact in zip(out[1:], want[1:], strict=True):
            assert got.shape == exact.shape and (got - exact).abs().le(1e-6 * size).all()


def test_sums_of_many_pieces_are_those_of_float64(emulated: Any) -> None:
    """More partial sums than a warp adds alone: 1300 pieces, added by 256 threads."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(1300 * 1024 - 8, generator=generator).bfloat16() for _ in range(2))
    scale, offset = torch.tensor(0.2), torch.tensor(0.1)
    arguments = (scale, offset, -8, 7, "lsq_plus", None, None, 1.0, 0.0)
    got, want = (
        function(g, x, *arguments) for function in (emulated.fake_quantize_backward, reference.fake_quantize_backward)
    )
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        assert (a - b).abs() <= 1e-7 * 8 * g.float().abs().sum()


def test_faults_reach_the_gradients(emulated: Any) -> None:
    x = torch.randn(4, 64)
    x[1, 5] = math.nan
    for estimator in ESTIMATORS:
        zero = torch.zeros(4) if estimator in OFFSET else None
        arguments = (torch.full((4,), 0.3), zero, -8, 7, estimator, 0, None)
        got = emulated.fake_quantize_backward(torch.ones(4, 64), x, *arguments)
        want = reference.fake_quantize_backward(torch.ones(4, 64), x, *arguments)
        assert torch.equal(got[0], want[0])
        for a, b in zip(got[1:], want[1:], strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and (
                a.numel() == 0 or a.isnan().tolist() == [False, True, False, False]
            )


def test_too_little_room_for_partial_sums_is_refused(emulated: Any, emulated_library: Any) -> None:
    x, scale, out = torch.ones(4096), torch.ones(()), torch.ones(4096)
    pointers = [t.data_ptr() for t in (x, x, scale, out, scale, scale)]
    code = emulated_library.qk_cuda_fake_quantize_backward(
        *(pointers[0], pointers[1], 0, 1, 4096, 1, 4096, 1, pointers[2], 0, -8.0, 7.0, 1, 1.0, 0.0),
        *(pointers[3], pointers[4], 0, pointers[5], 3, 0, None),
    )
    assert code == 1  # cudaErrorInvalidValue: 4 pieces
