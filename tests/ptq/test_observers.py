"""Scales of least squared error against brute force, the table of a Gaussian, and min-max."""

import numpy as np
import pytest
import torch

from qclip.ptq.base import quantize_weight
from qclip.ptq.observers import RANGES, least_squares_scales
from qclip.recipes import SitePlan
from qkernels import Int4Weight


def weights(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Rows of several shapes and sizes: heavy tails, one-sided ones, an outlier, whole numbers."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    w[0::5] **= 3
    w[1::5] = w[1::5].abs() + 0.1
    w[2::5, 0] *= 20
    w[3::5] = w[3::5].mul(4).round()
    return w * torch.logspace(-3, 1, n)[:, None]


def brute_force(values: np.ndarray, bits: int) -> float:
    """The least squared error of one group over all the scales that may be tried, one by one in float64."""
    top = 2 ** (bits - 1) - 1
    low, least = (-top - 1, top + 0.5) if bits <= 4 else (-top, top)
    absmax = np.float32(np.abs(values).max())
    scales = [absmax / np.float32(least), *(np.float32(1 - i / 100) * absmax / np.float32(top) for i in range(RANGES))]
    errors = []
    if bits == 4:
        scales = [np.float16(max(s, 2.0**-14)) for s in scales]
    for scale in map(float, scales):
        for signed in (scale, -scale) if bits <= 4 else (scale,):
            codes = np.clip(np.rint(values.astype(np.float64) / signed), low, top)
            errors.append(float(((codes * signed - values) ** 2).sum()))
    return min(errors)


def squared_errors(w: torch.Tensor, plan: SitePlan) -> np.ndarray:
    """`[N, groups]`, of the weight as it is stored."""
    off = (quantize_weight(w, plan).dequantize().double() - w.double()).square()
    width = plan.group or w.shape[1]
    return np.stack([part.sum(1).numpy() for part in off.split(width, dim=1)], axis=1)


@pytest.mark.parametrize(
    ("bits", "group"), [(4, 32), (4, 64), (4, 128), (4, None), (2, None), (3, None), (5, None), (8, None)]
)
@pytest.mark.parametrize("k", [1, 33, 200])
def test_no_other_scale_is_better(bits: int, group: int | None, k: int) -> None:
    w = weights(11, k)
    found = squared_errors(w, SitePlan("real", bits, 8, group, weight_observer="mse"))
    min_max = squared_errors(w, SitePlan("real", bits, 8, group))
    for row, of_row in zip(w.numpy(), found, strict=True):
        for at, error in enumerate(of_row):
            part = row[at * (group or k) : (at + 1) * (group or k)]
            # Ties and the last bits of float32 sums may choose another scale, of the same error but for those bits.
            assert error <= brute_force(part, bits) * (1 + 1e-5) + 1e-12 * float((part.astype(np.float64) ** 2).sum())
    assert (found <= min_max * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize(
    ("bits", "scale", "error"),
    [(2, 1.048, 0.1494), (3, 0.6018, 0.04064), (4, 0.3386, 0.01186), (5, 0.1881, 0.003693), (6, None, 0.001069)],
)
def test_gaussian_values_get_the_scale_that_is_known_to_be_best(bits: int, scale: float, error: float) -> None:
    """Minimal errors on N(0, 1), here its quantiles: methods 2.0. Scales are tried in steps of 1 % of the range."""
    w = torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536).float()[None]
    plan = SitePlan("real", bits, 8, None, weight_observer="mse")
    assert squared_errors(w, plan)[0, 0] / w.numel() == pytest.approx(error, rel=0.01)
    if bits <= 4:
        step = float(w.abs().max()) / (2 ** (bits - 1) - 1) / 100
        assert abs(float(least_squares_scales(w, bits).abs())) == pytest.approx(scale, abs=step)


def test_negative_scales_turn_the_grid_to_where_the_values_are() -> None:
    """Steps -7 .. 8 hold 8 and not -8, steps -8 .. 7 the reverse. Scales are tried in steps of 8/700."""
    w = torch.stack([torch.arange(-7.0, 9), torch.arange(-8.0, 8)])
    scales = least_squares_scales(w, 4)
    weight = Int4Weight.quantize(w, 16, scales=scales)
    assert (weight.scales < 0).tolist() == [[True], [False]]
    assert (weight.dequantize() - w).abs().max() <= 8 * (8 / 700 / 2 + 2**-11)  # half a step, rounded to float16


def test_groups_of_zeros_tiny_groups_and_large_ones() -> None:
    w = torch.zeros(3, 96)
    w[1, :32], w[1, 40], w[2] = 1e-7, 1e-30, 4e5
    for bits, group in ((4, 32), (4, None), (3, None), (8, None)):
        scales = least_squares_scales(w, bits, group)
        assert torch.isfinite(scales).all() and (scales[0] == 1).all()
        assert quantize_weight(w, SitePlan("real", bits, 8, group, weight_observer="mse")).dequantize().isfinite().all()
    assert (least_squares_scales(w, 4, 32).abs() >= 2.0**-14).all()


@pytest.mark.parametrize("largest", [6e5, 3e6, 1e30])
def test_what_float16_scales_cannot_hold_is_refused_as_by_min_max(largest: float) -> None:
    w = weights(3, 64)
    w[1, 7] = largest
    for observer in ("min-max", "mse"):
        with pytest.raises(ValueError, match="scales of an Int4Weight are float16"):
            quantize_weight(w, SitePlan("real", 4, 8, 32, weight_observer=observer))


def test_chunks_of_rows_are_rows() -> None:
    w = weights(300, 700)
    whole = least_squares_scales(w, 4, 128)
    assert torch.equal(whole, torch.cat([least_squares_scales(row[None], 4, 128) for row in w]))
