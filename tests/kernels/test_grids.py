"""Grids: the table of a Gaussian, scales against brute force, containers, and codes in few bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qkernels
from qkernels import Int4Weight, Int8Weight, reference
from qkernels.contract import Epilogue
from qkernels.grids import KINDS, RANGES, Grid
from qkernels.weights import (
    levels,
    pack_bits,
    quantize_weight,
    unpack_bits,
    weight_from_codes,
    weight_from_levels,
    zero_point_bias,
)

GROUPS = (None, 32, 64, 128)


def weights(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Rows of several shapes and sizes: heavy tails, one-sided ones, an outlier, whole numbers."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    w[0::5] **= 3
    w[1::5] = w[1::5].abs() + 0.1
    w[2::5, 0] *= 20
    w[3::5] = w[3::5].mul(4).round()
    return w * torch.logspace(-3, 1, n)[:, None]


def held(group: int | None) -> list[Grid]:
    """All grids of this group that a weight can hold."""
    found = []
    for bits, kind in itertools.product(range(1, 9), KINDS):
        try:
            grid = Grid(bits, kind, group)
            assert grid.container
        except ValueError:
            continue
        found.append(grid)
    return found


HELD = [grid for group in GROUPS for grid in held(group)]


# -- rounding --------------------------------------------------------------------------------------------------------

# Minimal mean squared errors on N(0, 1) and the scales that reach them (docs/methods.md, Grids).
TABLE = [
    *((1, "midrise", 1.5958, 0.36338), (1, "symfull", None, 0.595)),
    *((2, "midrise", 0.9957, 0.11885), (2, "sym", 1.224, 0.1902), (2, "symfull", 1.048, 0.1494)),
    *((3, "midrise", 0.5860, 0.03744), (3, "sym", 0.6508, 0.04686), (3, "symfull", 0.6018, 0.04064)),
    *((4, "midrise", 0.3352, 0.011543), (4, "sym", 0.3534, 0.01289), (4, "symfull", 0.3386, 0.01186)),
    *((5, "midrise", 0.1881, 0.003495), (5, "sym", None, 0.003693), (5, "symfull", None, 0.003526)),
    *((6, "midrise", 0.1041, 0.001040), (6, "sym", None, 0.001069), (6, "symfull", None, 0.001043)),
    *((7, "midrise", 0.0569, 3.04e-4), (7, "sym", None, 3.09e-4), (7, "symfull", None, 3.04e-4)),
    *((8, "midrise", 0.0308, 8.8e-5), (8, "sym", None, 8.8e-5), (8, "symfull", None, 8.8e-5)),
]


@pytest.mark.parametrize(("bits", "kind", "scale", "error"), TABLE)
def test_errors_on_a_gaussian_are_those_of_the_table(bits: int, kind: str, scale: float | None, error: float) -> None:
    grid = Grid(bits, kind)  # type: ignore[arg-type]
    x = torch.linspace(-7, 7, 140001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) * (x[1] - x[0]) / (2 * np.pi) ** 0.5

    def at(step: float) -> float:
        size = torch.tensor(step, dtype=torch.float64)
        return float((density * (grid.decode(grid.encode(x, size), size) - x) ** 2).sum())

    around = [scale] if scale else torch.logspace(-2, 0.5, 150).tolist()
    found = min((at(step), step) for step in around)
    assert found[0] == pytest.approx(error, rel=6e-3)
    if scale:
        assert at(scale * 1.02) > found[0] < at(scale / 1.02), "the scale of the table is the best one"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_and_bounds(kind: str, bits: int) -> None:
    grid = Grid(bits, kind)  # type: ignore[arg-type]
    top = 2 ** (bits - 1) - 1
    want = {"sym": (-top, top), "symfull": (-top - 1, top)}.get(kind, (0, 2**bits - 1))
    assert (grid.low, grid.high) == want
    zero = {"sym": 0.0, "symfull": 0.0, "midrise": (2**bits - 1) / 2, "asym": 3.0, "floatzero": 3.3}[kind]
    x = torch.tensor([-1e6, -3.5, -2.5, -0.5, -0.0, 0.5, 1.5, 2.5, 1e6])
    codes = grid.encode(x, torch.tensor(1.0), torch.tensor(zero))
    by_hand = [min(max(round(float(np.float32(v + zero % 1))) + int(zero), want[0]), want[1]) for v in x.tolist()]
    assert codes.tolist() == by_hand
    assert torch.equal(grid.decode(codes, torch.tensor(2.0), torch.tensor(zero)), 2 * (codes - zero))


# -- scales ----------------------------------------------------------------------------------------------------------


def brute_force(values: np.ndarray, grid: Grid) -> float:
    """The least squared error of one group over all the scales that may be tried, one by one in float64."""
    top, f = 2 ** (grid.bits - 1) - 1, np.float32
    parts = [1 - i / 100 for i in range(RANGES)]
    low, high = min(f(0), values.min()), max(f(0), values.max())
    if grid.kind in ("sym", "symfull"):
        absmax = np.abs(values).max()
        first = absmax / f(top + 0.5 * (grid.kind == "symfull"))
        tried = [(first, 1.0), *((f(p) * absmax / f(max(top, 0.5)), p) for p in parts)]
    elif grid.kind == "midrise":
        tried = [(f(p) * np.abs(values).max() / f(grid.high / 2), p) for p in parts]
    else:
        tried = [(f(p) * (high - low) / f(grid.high), p) for p in parts]
    half = grid.container == "Int4Weight"
    errors = []
    for scale, part in tried:
        scale = float(np.float16(max(scale, 2.0**-14))) if half else float(scale)
        for signed in (scale, -scale) if grid.kind == "symfull" else (scale,):
            zero = grid.zero
            if zero is None:
                zero = np.clip(-float(low) * part / signed, 0, grid.high)
                zero = float(np.float16(np.rint(zero) if grid.kind == "asym" else zero))
            codes = np.clip(
                np.rint(values.astype(np.float64) / signed + zero % 1) + np.floor(zero), grid.low, grid.high
            )
            errors.append(float((((codes - zero) * signed - values) ** 2).sum()))
    return min(errors)


def squared_errors(w: torch.Tensor, grid: Grid, observer: str) -> np.ndarray:
    """`[N, groups]`, of the weight as it is stored."""
    scales, zeros = grid.fit(w, observer)
    off = (quantize_weight(w, grid, scales, zeros).dequantize().double() - w.double()).square()
    return np.stack([part.sum(1).numpy() for part in off.split(grid.group or w.shape[1], dim=1)], axis=1)


@pytest.mark.parametrize("grid", [g for g in HELD if g.group in (None, 64)], ids=str)
def test_no_other_scale_is_better(grid: Grid) -> None:
    for k in (1, 33, 200):
        w = weights(11, k)
        found, min_max = squared_errors(w, grid, "mse"), squared_errors(w, grid, "min-max")
        group = grid.group or k
        for row, of_row in zip(w.numpy(), found, strict=True):
            for at, error in enumerate(of_row):
                part = row[at * group : (at + 1) * group]
                # Ties and the last bits of float32 sums may choose another scale, of the same error but for those bits.
                assert error <= brute_force(part, grid) * (1 + 1e-4) + 1e-12 * float((part.astype(float) ** 2).sum())
        assert (found <= min_max * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize(("bits", "scale", "error"), [(2, 1.048, 0.1494), (3, 0.6018, 0.04064), (4, 0.3386, 0.01186)])
def test_gaussian_values_get_the_scale_that_is_known_to_be_best(bits: int, scale: float, error: float) -> None:
    """N(0, 1) by its quantiles. Scales are tried in steps of 1 % of the range."""
    w = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536).float()[None]
    grid = Grid(bits, "symfull")
    assert squared_errors(w, grid, "mse")[0, 0] / w.numel() == pytest.approx(error, rel=0.01)
    step = float(w.abs().max()) / (2 ** (bits - 1) - 1) / 100
    assert abs(float(grid.fit(w, "mse")[0].abs())) == pytest.approx(scale, abs=step)


def test_negative_scales_turn_the_grid_to_where_the_values_are() -> None:
    """Steps -7 .. 8 hold 8 and not -8, steps -8 .. 7 the reverse. Scales are tried in steps of 8/700."""
    w = torch.stack([torch.arange(-7.0, 9), torch.arange(-8.0, 8)])
    scales, _ = Grid(4, "symfull").fit(w, "mse")
    weight = Int4Weight.quantize(w, 16, scales=scales)
    assert (weight.scales < 0).tolist() == [[True], [False]]
    assert (weight.dequantize() - w).abs().max() <= 8 * (8 / 700 / 2 + 2**-11)  # half a step, rounded to float16


@pytest.mark.parametrize("grid", HELD, ids=str)
def test_groups_of_zeros_tiny_groups_and_large_ones(grid: Grid) -> None:
    w = torch.zeros(3, 96)
    w[1, :32], w[1, 40], w[2] = 1e-7, 1e-30, 3e4
    for observer in ("min-max", "mse"):
        scales, zeros = grid.fit(w, observer)
        assert torch.isfinite(scales).all() and ((scales[0] == 1) | (grid.kind == "midrise")).all()
        got = quantize_weight(w, grid, scales, zeros).dequantize()
        # A row of zeros stays one; of midrise, which has no zero, as far as the container holds small scales.
        least = 0.0 if grid.kind != "midrise" else 2.0**-15 if grid.container == "Int4Weight" else 2.0**-101
        assert got.isfinite().all() and got[0].abs().max() <= least
        if grid.container == "Int4Weight":
            assert (scales.abs() >= 2.0**-14).all() and torch.equal(scales, scales.half().float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("largest", [6e5 * 2, 3e6, 1e30])
def test_what_float16_scales_cannot_hold_is_refused(kind: str, largest: float) -> None:
    w, grid = weights(3, 64), Grid(4, kind, 32)  # type: ignore[arg-type]
    w[1, 7] = largest
    for observer in ("min-max", "mse"):
        with pytest.raises(ValueError, match="scales of an Int4Weight are float16"):
            quantize_weight(w, grid, *grid.fit(w, observer))


@pytest.mark.parametrize("observer", ["mse", "percentile"])
def test_values_whose_squares_leave_float32_get_the_whole_range(observer: str) -> None:
    w = weights(3, 64) / weights(3, 64).abs().amax(1, True) * torch.tensor([[1e25], [1e38], [1.0]])
    for grid in (Grid(8, "sym"), Grid(3, "symfull"), Grid(5, "midrise")):
        found, whole = (grid.fit(w, each)[0] for each in (observer, "min-max"))
        assert torch.equal(found[:2], whole[:2])
        assert quantize_weight(w, grid, found).dequantize().isfinite().all()


def test_chunks_of_rows_are_rows() -> None:
    w = weights(100, 700)
    for kind in ("symfull", "floatzero"):
        grid = Grid(4, kind, 128)  # type: ignore[arg-type]
        scales, zeros = grid.fit(w, "mse")
        rows = [grid.fit(part, "mse") for part in w.split(9)]
        assert torch.equal(scales, torch.cat([found for found, _ in rows]))
        assert zeros is None or torch.equal(zeros, torch.cat([found for _, found in rows if found is not None]))


def test_the_weight_that_was_given_does_not_change() -> None:
    w = weights(5, 64)
    kept = w.clone()
    for grid in held(None) + held(32):
        quantize_weight(w, grid, *grid.fit(w))
        grid.fit(w, "mse")
    assert torch.equal(w, kept)


# -- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", HELD, ids=str)
def test_a_weight_has_the_values_of_its_grid(grid: Grid) -> None:
    w = weights(9, 200, seed=1)
    scales, zeros = grid.fit(w)
    weight = quantize_weight(w, grid)
    group = grid.group or 200
    spread = [None if v is None else v.repeat_interleave(group, 1)[:, :200] for v in (scales, zeros)]
    codes = grid.encode(w, spread[0], spread[1])
    assert torch.equal(weight.dequantize(), grid.decode(codes, spread[0], spread[1]))
    again = weight_from_codes(codes, grid, scales, zeros)
    found = levels(weight, grid)
    assert torch.equal(found, (codes - grid.low).to(torch.uint8))
    packed = pack_bits(found, grid.bits)
    assert len(packed) == -(-9 * 200 * grid.bits // 8)
    unpacked = unpack_bits(packed, grid.bits, found.numel()).view(9, 200)
    loaded = weight_from_levels(unpacked, grid, weight.scales, getattr(weight, "zeros", None))
    for other in (again, loaded):
        assert type(other) is type(weight) and other.shape == weight.shape
        for name in ("codes", "scales", "zeros", "group"):
            a, b = getattr(weight, name, None), getattr(other, name, None)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b, name


@pytest.mark.parametrize("grid", HELD, ids=str)
def test_kernels_multiply_every_grid(grid: Grid) -> None:
    """Integer sums are exact in both: what remains is the rounding of a few float32 operations."""
    generator = torch.Generator().manual_seed(3)
    w = weights(70, 200, seed=2)
    x = torch.randint(-127, 128, (7, 200), generator=generator, dtype=torch.int8)
    scale = torch.rand(7, generator=generator) / 127
    weight = quantize_weight(w, grid)
    op = qkernels.int8_linear if isinstance(weight, Int8Weight) else qkernels.int4_linear
    want = (x.double() * scale.double()[:, None]) @ weight.dequantize().double().t()
    bound = (x.double().abs() * scale.double()[:, None]) @ weight.dequantize().double().abs().t()
    got = op(x, scale, qkernels.pack(weight))  # type: ignore[operator]
    assert ((got.double() - want).abs() <= 1e-6 * bound).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(4, "odd"), "unknown kind of grid 'odd'"),  # type: ignore[arg-type]
        (lambda: Grid(1, "sym"), "has 2 to 8 bits"),
        (lambda: Grid(9, "asym"), "has 1 to 8 bits"),
        (lambda: Grid(4, "sym", 0), "positive number"),
        (lambda: Grid(4, "sym").fit(torch.ones(2, 2), "best"), "unknown observer"),  # type: ignore[arg-type]
        (lambda: quantize_weight(torch.ones(2, 64), Grid(8, "sym", 32)), "no kernel multiplies.*groups"),
        (lambda: quantize_weight(torch.ones(2, 64), Grid(5, "asym")), "no kernel multiplies.*zero points"),
        (lambda: quantize_weight(torch.ones(2, 64), Grid(8, "midrise")), "no kernel multiplies.*7 bits"),
        (lambda: quantize_weight(torch.ones(2, 100), Grid(4, "sym", 48)), "group must be 32, 64, 128"),
        (lambda: quantize_weight(torch.ones(2, 64), Grid(4), zeros=torch.ones(2, 1)), "leave zeros out"),
        (lambda: quantize_weight(torch.ones(2, 64), Grid(8), torch.zeros(2)), "finite reciprocals"),
        (lambda: quantize_weight(torch.ones(2, 64), Grid(8), torch.tensor([1.0, -1e-40])), "finite reciprocals"),
        (lambda: quantize_weight(torch.ones(2, 64), Grid(8), torch.ones(3)), "must be 2 finite numbers"),
        (lambda: Int8Weight.quantize(torch.ones(2, 64), torch.tensor([1.0, -1.0])), "2 positive finite"),
        (lambda: weight_from_codes(torch.full((2, 4), 8), Grid(4), torch.ones(2)), "whole numbers -7 .. 7"),
        (lambda: weight_from_codes(torch.full((2, 4), 0.5), Grid(4), torch.ones(2)), "whole numbers"),
        (lambda: weight_from_codes(torch.ones(4), Grid(4), torch.ones(2)), "must be \\[N, K\\]"),
        (lambda: weight_from_codes(torch.ones(2, 4), Grid(4, "asym"), torch.ones(2)), "give zeros"),
        (lambda: Grid(4, "asym").encode(torch.ones(2), torch.ones(())), "has a zero for every scale"),
        (lambda: levels(Int8Weight.quantize(torch.ones(2, 4)), Grid(4)), "is held in an Int4Weight"),
        (lambda: levels(Int8Weight.quantize(torch.ones(2, 4)), Grid(5)), "codes outside it"),
        (
            lambda: levels(
                Int8Weight(torch.full((2, 4), 2, dtype=torch.int8), torch.ones(2), (2, 4)), Grid(5, "midrise")
            ),
            "even",
        ),
        (lambda: levels(Int4Weight.quantize(torch.ones(2, 4)), Grid(4, "asym")), "no zeros"),
        (
            lambda: weight_from_levels(torch.full((2, 4), 15, dtype=torch.uint8), Grid(4), torch.ones(2), None),
            "up to 14",
        ),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- codes in few bits -----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(bits=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_packing_bits_is_a_bijection(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    whole = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == whole.to_bytes(-(-count * bits // 8), "little")
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_hostile_packed_codes_are_refused(bits: int) -> None:
    packed = pack_bits(torch.zeros(13, dtype=torch.uint8), bits)
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]])):
        with pytest.raises(ValueError, match="take"):
            unpack_bits(wrong, bits, 13)
    if 13 * bits % 8:
        packed[-1] |= 1 << (13 * bits % 8)
        with pytest.raises(ValueError, match="bits set behind"):
            unpack_bits(packed, bits, 13)
    for wrong, error in ((packed.char(), TypeError), (packed[None], TypeError)):
        with pytest.raises(error, match="one-dimensional uint8"):
            unpack_bits(wrong, bits, 13)
    with pytest.raises(ValueError, match="at least 0"):
        unpack_bits(packed, bits, -1)
    with pytest.raises(TypeError, match="must be uint8"):
        pack_bits(torch.zeros(3, dtype=torch.int8), bits)
    if bits < 8:
        with pytest.raises(ValueError, match="does not fit"):
            pack_bits(torch.full((3,), 2**bits, dtype=torch.uint8), bits)
    for nonsense in (0, 9, 2.0):
        with pytest.raises(ValueError, match="1 to 8 bits"):
            pack_bits(torch.zeros(3, dtype=torch.uint8), nonsense)  # type: ignore[arg-type]


# -- static zero points of activations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid", [Grid(8), Grid(3, "symfull"), Grid(5, "midrise"), Grid(4, "asym", 32), Grid(4, "sym")], ids=str
)
def test_a_zero_point_of_the_input_goes_into_the_bias(grid: Grid) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(11, 200, generator=generator) * 3 - 0.3  # one-sided, as after an activation
    bias = torch.randn(70, generator=generator)
    weight, scale, zero_point = quantize_weight(weights(70, 200), grid), 3.0 / 254, -102
    codes, scales = qkernels.quantize_per_token(x, scale=scale, zero_point=zero_point)
    assert codes.min() < -120 and codes.max() > 120
    packed, whole = qkernels.pack(weight), zero_point_bias(weight, scale, zero_point, bias)
    assert whole.dtype == torch.float32 and torch.equal(zero_point_bias(packed, scale, zero_point, bias), whole)
    op = qkernels.int8_linear if isinstance(weight, Int8Weight) else qkernels.int4_linear
    got = op(codes, scales, packed, whole)  # type: ignore[operator]
    step = torch.tensor(scale, dtype=torch.float32).double()
    values = step * (codes.double() - zero_point)
    want = values @ weight.dequantize().double().t() + bias.double()
    bound = (codes.double().abs() * step) @ weight.dequantize().double().abs().t() + whole.double().abs()
    assert ((got.double() - want).abs() <= 1e-6 * bound).all()
    slow = getattr(reference, op.__name__)(codes, scales, weight, Epilogue(whole))
    assert ((got - slow).double().abs() <= 1e-6 * bound).all()
    without = zero_point_bias(weight, torch.tensor(scale), torch.tensor(zero_point))
    assert torch.allclose(without + bias, whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))
