"""fake_quantize in Triton against the reference: forward by bits, gradients to 1e-5 of the magnitudes that they sum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import reference
from qkernels.contract import ESTIMATORS, LEARNED_SCALE, OFFSET
from qkernels.granularity import Granularity, granularity
from qkernels.triton import fake_quantize as kernels
from tests.kernels.fresh_memory import guarded
from tests.kernels.test_fake_quantize import SHARING, scales_for, spread, zeros_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUNDS = [(-8, 7), (0, 255), (-(2**23), 2**23)]


def bits(x: Tensor) -> Tensor:
    """NaN in one form, and -0 is not 0."""
    return torch.where(x.isnan(), math.nan, x).view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def cut(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 as the interpreter of Triton 3.8 makes it bfloat16: without its last 16 bits. A GPU rounds half to
    even."""
    return (x.view(torch.int32) >> 16).to(torch.int16).view(dtype) if dtype == torch.bfloat16 else x.to(dtype)


def check(how: tuple, estimator: str, dtype: torch.dtype, bounds: tuple[int, int], shifted: bool, seed: int) -> None:
    """Both halves, of values near ties, outside of the bounds, NaN and infinite."""
    shape, axis, group = how
    generator = torch.Generator().manual_seed(seed)
    scale = scales_for(shape, axis, group, generator)
    if scale.numel() > 1:
        scale.view(-1)[1] = 0.125
    zero = zeros_for(scale, estimator, generator) if shifted else None
    x = torch.randn(shape, generator=generator) * 2
    if x.numel() > 5:
        x.view(-1)[5::2] = (x.view(-1)[5::2] * 16).floor() / 16  # halves of 1/8
        x.view(-1)[:5] = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -0.01])[torch.randperm(5)]
    x, g = x.to(dtype), torch.randn(shape, generator=generator).to(dtype)
    delta = 0.4 if estimator == "ewgs" else 0.0
    rest = (*bounds, estimator, axis, group, 0.7, delta)

    out = guarded(x.shape, dtype)
    kernels.fake_quantize(x, scale, zero, *rest, out=out)
    wide = reference.fake_quantize(x.float(), scale, zero, *rest)
    assert torch.equal(bits(out), bits(wide.to(dtype))) or torch.equal(bits(out), bits(cut(wide, dtype)))

    wanted = reference.fake_quantize_backward(g, x, scale, zero, *rest)
    results = [guarded(want.shape, want.dtype) for want in wanted]
    kernels.fake_quantize_backward(g, x, scale, zero, *rest, out=tuple(results))
    (dx, *sums), (wanted_dx, *wanted_sums) = results, wanted
    # EWGS: some roundings in float32, then one to x's dtype. The others pass G or 0.
    tolerance = max(1e-5, torch.finfo(dtype).eps) if estimator == "ewgs" else 0.0
    torch.testing.assert_close(dx, wanted_dx, rtol=tolerance, atol=0.0, equal_nan=True)

    # The terms of each sum: the same gradients where every value has a scale of its own.
    owner = torch.from_numpy(
        spread(np.arange(scale.numel()).reshape(scale.shape), shape, axis, group).astype(int)
    ).reshape(-1)
    own = None if zero is None else zero.reshape(-1)[owner]
    terms = reference.fake_quantize_backward(
        g.reshape(-1), x.reshape(-1), scale.reshape(-1)[owner], own, *bounds, estimator, 0, None, 1.0, delta
    )[1:]
    for found, want, each in zip(sums, wanted_sums, terms, strict=True):
        if want.numel() and want.shape == scale.shape:
            size = torch.zeros(scale.numel()).index_add(0, owner, torch.maximum(each.abs(), 0.5 * g.reshape(-1).abs()))
            close = (found - want).abs().reshape(-1) <= 1e-5 * size
            assert torch.where(want.reshape(-1).isnan(), found.reshape(-1).isnan(), close).all()


def name(how: tuple) -> str:
    shape, axis, group = how
    return (
        "x".join(map(str, shape)) + ("" if axis is None else f"-axis{axis}") + ("" if group is None else f"-g{group}")
    )


def normalised(how: tuple) -> tuple:
    """As `qkernels.ops` hands it on: no negative axis."""
    shape, axis, group = how
    return shape, None if axis is None else axis % len(shape), group


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("how", SHARING, ids=name)
def test_against_the_reference(how: tuple, estimator: str) -> None:
    """Dtypes, bounds and zero points take turns, so that every estimator meets each of them."""
    turn = SHARING.index(how) + ESTIMATORS.index(estimator)
    shifted = turn % 2 == 0 and estimator not in ("pact", "dorefa")
    check(normalised(how), estimator, DTYPES[turn % 3], BOUNDS[turn // 3 % 3], shifted, turn)


#: with tiles of 32 values (half of 64: lengths are no multiples of 16): several programs a scale, several tiles a
#: program (their number), both with a rest
WALKS = {
    "tensor": (((1003,), None, None), 4),
    "rows": (((70, 150), 0, None), 5),
    "long rows": (((3, 411), 0, None), 5),
    "middle": (((3, 5, 77), 1, None), 3),
    "columns": (((53, 37), 1, None), 27),
    "groups": (((11, 100), None, 32), 1),
    "groups in pieces": (((2, 300), None, 128), 2),
}


@pytest.mark.parametrize("walk", WALKS)
def test_every_walk_over_the_values(walk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "ROWS", 8)
    monkeypatch.setattr(kernels, "TERMS", 8)
    how, steps = WALKS[walk]
    shape, axis, group = how
    scale = scales_for(shape, axis, group, torch.Generator())
    assert kernels.tiling(granularity(torch.empty(shape), scale, axis, group), True).steps == steps
    for estimator in ("lsq", "ewgs"):
        check(how, estimator, torch.float32, (-8, 7), True, 3)


@pytest.mark.parametrize("sums", [False, True])
def test_tiles_cover_the_values_once(sums: bool) -> None:
    for runs, length in ((1, 1), (1, 4095), (1, 4097), (1, 2**31 - 1), (768, 3072), (3072, 768), (32, 2**20), (7, 588)):
        tiles = kernels.tiling(Granularity(runs, length, 1, length, runs), sums)
        assert tiles.height * tiles.width <= kernels.TILE and not tiles.columns
        assert (tiles.down - 1) * tiles.height < runs <= tiles.down * tiles.height
        reach = tiles.steps * tiles.width
        assert (tiles.across - 1) * reach < length <= tiles.across * reach
        assert tiles.down * tiles.across < 2**31
        assert not sums or tiles.terms(Granularity(runs, length, 1, length, runs)) <= kernels.TERMS
    for rows, columns in ((1, 2), (12800, 768), (2**20, 64), (50, 588), (3, 2**20)):
        share = Granularity(rows * columns, 1, 1, 1, columns)
        tiles = kernels.tiling(share, sums)
        reach = tiles.steps * tiles.height
        assert tiles.columns and tiles.height * tiles.width <= kernels.TILE
        assert (tiles.down - 1) * reach < rows <= tiles.down * reach and tiles.terms(share) <= kernels.TERMS
        assert (tiles.across - 1) * tiles.width < columns <= tiles.across * tiles.width


def test_weights_by_channel_need_one_launch() -> None:
    for rows, columns in ((768, 768), (3072, 768), (768, 3072), (1024, 4096)):
        share = Granularity(rows, columns, 1, columns, rows)
        assert kernels.tiling(share, True).terms(share) == 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_through_autograd(estimator: str) -> None:
    """The public op, on a view that is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(20, 9, generator=generator).requires_grad_()
    scale = (torch.rand(9, generator=generator) / 4 + 0.1).requires_grad_()
    zero = torch.randn(9, generator=generator).requires_grad_() if estimator in OFFSET else None
    x, g = leaf.t(), torch.randn(20, 9, generator=generator).t()
    y = qkernels.fake_quantize(x, scale, zero, -8, 7, estimator, axis=0)
    y.backward(g)
    wanted = reference.fake_quantize_backward(g, x.detach(), scale.detach(), zero, -8, 7, estimator, 0)
    assert torch.equal(leaf.grad, wanted[0].t())
    for parameter, want in zip((scale, zero), wanted[1:], strict=True):
        if parameter is not None and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, want.detach(), rtol=1e-5, atol=1e-5)
    assert (scale.grad is not None) == (estimator in LEARNED_SCALE)


@pytest.mark.parametrize("how", [((5,), None, None), ((3, 5), 0, None), ((3, 5), 1, None), ((3, 5), None, 4)], ids=name)
def test_what_is_read_beside_the_values_adds_nothing(how: tuple) -> None:
    shape, axis, group = how
    scale = torch.zeros_like(scales_for(shape, axis, group, torch.Generator())).requires_grad_()
    qkernels.fake_quantize(torch.ones(shape), scale, None, -8, 7, "lsq", axis, group).sum().backward()
    assert scale.grad.sum() == 7 * np.prod(shape)
