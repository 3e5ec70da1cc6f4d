"""Observers of activation ranges against numpy, torch's own observers, and the optimum known for Gaussian data."""

import numpy as np
import pytest
import torch

from qclip import calibration
from qclip.layers.activations import code_range, quantize_dequantize, static_quantizer
from qclip.recipes import Treatment

KINDS = ("min-max", "ema", "percentile", "mse")


def watched(kind, *batches):
    observer = calibration.OBSERVERS[kind]()
    for batch in batches:
        observer.update(batch)
    return observer


def treatment(kind="mse", bits=8, grid="sym", **rest):
    return Treatment(8, bits, static=True, activation_observer=kind, activation_grid=grid, **rest)


def lopsided(n=40_000):
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.gelu(3 * torch.randn(n, generator=generator)) * torch.linspace(0.01, 1, n)


@pytest.mark.parametrize("grid", ["sym", "asym"])
@pytest.mark.parametrize("kind", ["min-max", "percentile", "mse"])
def test_ranges_do_not_depend_on_batches(kind, grid):
    x, plan = lopsided(), treatment(kind, 8, grid)
    whole = watched(kind, x).span(plan)
    assert watched(kind, *x.split(333)).span(plan) == whole
    assert watched(kind, *reversed(x.split(7919))).span(plan) == whole


def test_the_histogram_counts_every_value_once_on_its_side():
    x = torch.cat([lopsided(), torch.zeros(7), torch.tensor([-1.0, 1.0])])
    histogram = watched("mse", *x.split(1000))
    assert histogram.above.sum() + histogram.below.sum() == len(x) and histogram.below.sum() == (x < 0).sum()
    counts, _ = np.histogram(x[x >= 0].numpy(), 2048, (0, histogram.top))
    assert np.array_equal(histogram.above.numpy(), counts)
    assert (histogram.low, histogram.high) == (float(x.min()), float(x.max()))


def test_ema_is_that_of_torch():
    from torch.ao.quantization import MovingAverageMinMaxObserver

    batches = lopsided().split(4000)
    theirs = MovingAverageMinMaxObserver(averaging_constant=0.1)
    for batch in batches:
        theirs(batch)
    low, high = watched("ema", *batches).span(treatment("ema"))
    assert (low, high) == pytest.approx((float(theirs.min_val), float(theirs.max_val)), rel=1e-5)
    assert (low, high) != watched("ema", *reversed(batches)).span(treatment("ema"))  # it forgets
    constant = watched("ema", *[torch.tensor([-2.0, 5.0])] * 20).span(treatment("ema"))
    assert constant == pytest.approx((-2.0, 5.0))


@pytest.mark.parametrize("percentile", [90.0, 99.9, 99.99, 100.0])
def test_percentiles_are_those_of_numpy_within_a_bin(percentile):
    x = lopsided()
    histogram = watched("percentile", *x.split(777))
    rest = {} if percentile == 99.99 else {"activation_percentile": percentile}
    low, high = histogram.span(treatment("percentile", grid="asym", **rest))
    want = np.percentile(x.numpy(), [100 - percentile, percentile])
    # Numpy's lie between two neighbouring values, which may be bins apart where there are few.
    for got, end, share in ((low, want[0], 100 - percentile), (high, want[1], percentile)):
        below, above = (np.percentile(x.numpy(), share, method=m) for m in ("lower", "higher"))
        assert below - histogram.width <= got <= above + histogram.width, (got, end)
    _, top = histogram.span(treatment("percentile", **rest))
    magnitudes = x.abs().numpy()
    below, above = (np.percentile(magnitudes, percentile, method=m) for m in ("lower", "higher"))
    assert below - histogram.width <= top <= above + histogram.width


@pytest.mark.parametrize(
    ("bits", "scale", "mse"), [(2, 1.224, 0.1902), (3, 0.6508, 0.04686), (4, 0.3534, 0.01289), (8, 0.0308, 8.8e-5)]
)
def test_least_squares_finds_the_known_optimum_on_gaussian_data(bits, scale, mse):
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    found, _ = watched("mse", *x.split(100_000)).quantizer(treatment(bits=bits))
    error = (quantize_dequantize(x, bits, found) - x).square().mean()
    assert float(found) == pytest.approx(scale, rel=0.03) and float(error) == pytest.approx(mse, rel=0.02)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("grid", ["sym", "asym"])
def test_least_squares_is_no_worse_than_min_max(grid, bits):
    x = lopsided()
    histogram, plan = watched("mse", x), treatment(bits=bits, grid=grid)
    least = histogram.mean_squared_error(histogram.span(plan), plan)
    assert least <= histogram.mean_squared_error(watched("min-max", x).span(plan), plan) * (1 + 1e-3)
    if bits == 3:  # and here it is better by far
        assert least < 0.5 * histogram.mean_squared_error(watched("min-max", x).span(plan), plan)
    scale, zero = static_quantizer(*histogram.span(plan), bits, grid)
    exact = float((quantize_dequantize(x, bits, scale, zero) - x).square().mean())
    assert exact == pytest.approx(least, rel=0.02)  # the bins tell the truth


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_use_every_code_and_keep_zero(bits):
    x = torch.linspace(-0.17, 3, 4001)
    scale, zero = static_quantizer(-0.17, 3.0, bits, "asym")
    y = quantize_dequantize(x, bits, scale, zero)
    least, most = code_range(bits, "asym")
    assert len(y.unique()) == most - least + 1 == (255 if bits == 8 else 2**bits)
    assert (y - x).abs().max() <= float(scale) and (y - x)[1:-1].abs().median() <= float(scale) / 2
    assert quantize_dequantize(torch.zeros(1), bits, scale, zero) == 0
    assert torch.equal(quantize_dequantize(y, bits, scale, zero), y)


def test_a_token_of_its_own_zero_point():
    torch.manual_seed(0)
    x = torch.rand(50, 64) * torch.logspace(-3, 3, 50)[:, None] + torch.randn(50, 1).clamp(min=0)
    for bits in (3, 8):
        y = quantize_dequantize(x, bits, grid="asym")
        steps = x.amax(1) / (2**bits - 1 if bits < 8 else 254)  # all lie above 0
        assert ((y - x).abs().amax(1) <= steps * 0.501).all()
        assert (y - x).square().sum() < 0.4 * (quantize_dequantize(x, bits) - x).square().sum()
        assert torch.equal(quantize_dequantize(torch.zeros(2, 4), bits, grid="asym"), torch.zeros(2, 4))


@pytest.mark.parametrize("grid", ["sym", "asym"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_of_zeros_has_scale_one_and_what_is_not_finite_is_told(kind, grid):
    plan = treatment(kind, grid=grid)
    scale, zero = watched(kind, torch.zeros(10)).quantizer(plan)
    assert scale == 1 and zero in (None, code_range(8, grid)[0]) and scale.dtype == torch.float32
    assert not quantize_dequantize(torch.zeros(3), 8, scale, zero).any()
    for value in (torch.inf, -torch.inf, torch.nan):
        assert not watched(kind, torch.ones(3), torch.tensor([1.0, value])).finite
    assert not watched(kind).seen and not watched(kind, torch.ones(0)).seen
