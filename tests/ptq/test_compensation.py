"""GPTQ's arithmetic against explicit OBQ, its own identity, and what follows from them."""

import itertools
from functools import partial

import pytest
import torch

from qclip.ptq.compensation import Factor, round_columns
from qkernels import weights
from qkernels.grids import Grid

GRIDS = [
    Grid(4, "symfull", 32),
    Grid(3, "symfull"),
    Grid(8, "sym"),
    Grid(4, "asym", 32),
    Grid(2, "midrise"),
    Grid(4, "floatzero"),
    Grid(4, "midrise", 64),
]


def correlated(n: int, k: int, seed: int, rank: int = 4) -> torch.Tensor:
    """Inputs of few directions and a little noise, channels of unequal size: float64 `[n, k]`."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rank, generator=draw) @ torch.randn(rank, k, generator=draw)
    x = x + 0.3 * torch.randn(n, k, generator=draw)
    return (x * (0.2 + 3 * torch.rand(k, generator=draw))).double()


def hessian(x: torch.Tensor) -> torch.Tensor:
    return 2 / len(x) * x.T @ x


def error(weight: torch.Tensor, rounded: torch.Tensor, h: torch.Tensor) -> float:
    off = weight.double() - rounded.double()
    return float(torch.trace(off @ h @ off.T))


def obq(weight: torch.Tensor, h: torch.Tensor, grid: Grid, order: list[int]) -> torch.Tensor:
    """Optimal Brain Quantization in a fixed order, the inverse of what is left of H computed anew for every column
    (Frantar & Alistarh 2208.11580). Float64 codes."""
    w, k = weight.clone(), weight.shape[1]
    group = k if grid.group is None else grid.group
    scales, zeros = grid.fit(weight)
    codes = torch.empty_like(w)
    for done, at in enumerate(order):
        left = order[done:]
        inverse = torch.linalg.inv(h[left][:, left])
        scale, zero = scales[:, at // group], None if zeros is None else zeros[:, at // group]
        codes[:, at] = grid.encode(w[:, at], scale, zero)
        off = (w[:, at] - grid.decode(codes[:, at], scale, zero)) / inverse[0, 0]
        w[:, left] -= off[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("block", [1, 8, 128])
def test_it_is_obq_with_re_inversion(grid: Grid, block: int) -> None:
    """In the order of the diagonal, which keeps groups where they lie."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).double()
    h = hessian(correlated(400, 64, 2))
    factor = Factor.of(h, 0.01, sort=True)
    got = round_columns(weight, factor, grid, block=block).weight
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(64).double()
    codes = obq(weight, damped, grid, h.diagonal().argsort(descending=True, stable=True).tolist())
    want = weights.weight_from_codes(codes, grid, *grid.fit(weight))
    assert torch.equal(got.dequantize(), want.dequantize())


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_sum_of_squares_is_the_error_of_its_result(grid: Grid, sort: bool) -> None:
    """sum ((w - q) / U_ii)^2 = tr(D H DT), with the damped H: any slip in scales, order or updates breaks it."""
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(3)).double()
    h = hessian(correlated(500, 96, 4))
    rounded = round_columns(weight, Factor.of(h, 0.02, sort), grid, partial(grid.fit, observer="mse"), 32)
    damped = h + 0.02 * h.diagonal().mean() * torch.eye(96).double()
    want = error(weight, rounded.weight.dequantize(), damped)
    assert abs(rounded.loss - want) < 1e-5 * want  # scales are float32 numbers


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_without_correlation_it_rounds_to_nearest(grid: Grid) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    h = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(6)) + 0.1)
    nearest = weights.quantize_weight(weight, grid).dequantize()
    for sort in (True, False):
        assert torch.equal(round_columns(weight, Factor.of(h, 0.01, sort), grid).weight.dequantize(), nearest)


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("grid", [Grid(4, "symfull", 32), Grid(3, "symfull"), Grid(2, "midrise")], ids=str)
def test_on_average_it_beats_rounding_to_nearest(grid: Grid, sort: bool) -> None:
    ours = nearest = 0.0
    for seed in range(10):
        weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
        h = hessian(correlated(600, 64, 100 + seed))
        ours += error(weight, round_columns(weight, Factor.of(h, 0.01, sort), grid).weight.dequantize(), h)
        nearest += error(weight, weights.quantize_weight(weight, grid).dequantize(), h)
    assert ours < 0.5 * nearest


def test_no_choice_of_codes_is_better_than_exhaustive_search() -> None:
    grid, k = Grid(2, "symfull"), 5
    for seed in range(5):
        weight = torch.randn(1, k, generator=torch.Generator().manual_seed(seed)).double()
        h = hessian(correlated(40, k, seed, rank=2))
        scale = grid.fit(weight)[0][0, 0].double()
        all_codes = torch.tensor(list(itertools.product(range(grid.low, grid.high + 1), repeat=k))).double()
        off = weight - all_codes * scale
        best = float((off @ h * off).sum(1).min())
        got = error(weight, round_columns(weight, Factor.of(h, 0.0), grid).weight.dequantize(), h)
        assert best <= got * (1 + 1e-9)


def test_groups_are_fitted_to_what_the_errors_before_have_made_of_them() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(7))
    h, grid = hessian(correlated(900, 128, 8)), Grid(4, "symfull", 32)
    as_they_come = round_columns(weight, Factor.of(h), grid, block=8).weight
    in_order = round_columns(weight, Factor.of(h, sort=True), grid).weight
    given = grid.fit(weight)[0]
    assert torch.equal(in_order.scales.float(), given)
    assert torch.equal(as_they_come.scales[:, 0].float(), given[:, 0])
    assert not torch.equal(as_they_come.scales[:, 1].float(), given[:, 1])


def test_a_channel_that_saw_nothing_is_rounded_to_nearest_and_kept() -> None:
    x = correlated(300, 32, 9)
    x[:, [3, 17]] = 0
    weight, grid = torch.randn(4, 32, generator=torch.Generator().manual_seed(10)), Grid(4, "symfull", 32)
    got = round_columns(weight, Factor.of(hessian(x), sort=True), grid).weight.dequantize()
    nearest = weights.quantize_weight(weight, grid).dequantize()
    assert torch.equal(got[:, [3, 17]], nearest[:, [3, 17]]) and not torch.equal(got, nearest)
    nothing = round_columns(weight, Factor.of(torch.zeros(32, 32)), grid).weight.dequantize()
    assert torch.equal(nothing, nearest)


@pytest.mark.parametrize("damp", [0.0, 1e-9])
def test_a_hessian_that_is_not_definite_is_damped_ten_times_more_until_it_is(damp: float) -> None:
    x = correlated(3, 32, 11)  # fewer inputs than channels
    h = hessian(x) - 1e-3 * torch.eye(32) * float(hessian(x).diagonal().mean())
    factor = Factor.of(h, damp)
    assert factor.damp in (1e-3, 1e-2) and factor.upper.isfinite().all()
    assert Factor.of(h, 0.05).damp == 0.05


def test_what_is_not_finite_or_has_no_scale_is_refused() -> None:
    h = torch.eye(32)
    h[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        Factor.of(h)
    with pytest.raises(ValueError, match="float16"):
        round_columns(torch.full((2, 32), 1e7), Factor.of(torch.eye(32)), Grid(4, "symfull", 32))
