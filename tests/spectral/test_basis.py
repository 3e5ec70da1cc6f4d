from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from qclip.spectral.bands import FLOOR, bands, level_of, shape_of
from qclip.spectral.basis import Basis, Spectrum, band_energy, band_gaps, effective_rank, stable_rank
from qclip.spectral.change import Change
from tests.spectral.towers import power_law, rounded

BANDS = ("ranks 0-8", "ranks 8-64", "ranks 64-")


def test_ranks_and_energy_have_their_known_values() -> None:
    one = torch.ones(30, dtype=torch.float64)
    assert effective_rank(one) == pytest.approx(30) and stable_rank(one) == pytest.approx(30)
    first = torch.tensor([5.0, 0, 0], dtype=torch.float64)
    assert effective_rank(first) == pytest.approx(1) and stable_rank(first) == pytest.approx(1)
    share = np.array([0.5, 0.3, 0.2])
    assert effective_rank(torch.from_numpy(share * 7)) == pytest.approx(math.exp(scipy.stats.entropy(share)))
    assert band_energy(torch.ones(80)) == pytest.approx({BANDS[0]: 0.1, BANDS[1]: 0.7, BANDS[2]: 0.2})
    assert list(bands(8)) == ["ranks 0-8"] and bands(5) == {"ranks 0-8": slice(0, 5)}
    assert bands(70)["ranks 64-"] == slice(64, 70)
    assert band_gaps(torch.tensor([2.0] * 8 + [1.5] * 4)) == pytest.approx({BANDS[0]: 0.25})


@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (100, 100)])
def test_the_basis_is_that_of_numpy_and_its_parts_add_up(shape: tuple[int, int]) -> None:
    weight = power_law(*shape)
    basis = Basis.of(weight)
    np.testing.assert_allclose(basis.s, np.linalg.svd(weight.numpy(), compute_uv=False), rtol=1e-12)
    np.testing.assert_allclose((basis.u * basis.s) @ basis.v.mT, weight, atol=1e-12)
    np.testing.assert_allclose(sum(basis.parts.values()).view(shape), weight, atol=1e-6)


def test_the_identity_and_a_rank_one_weight() -> None:
    eye = Basis.of(torch.eye(80, dtype=torch.float64))
    assert eye.energy == pytest.approx({BANDS[0]: 8, BANDS[1]: 56, BANDS[2]: 16})
    one = Basis.of(torch.outer(torch.arange(1.0, 81), torch.ones(70)))
    assert list(one.energy) == ["ranks 0-8"]  # nothing to damp elsewhere
    assert level_of({BANDS[0]: 0.5}, one.energy) == 0.5 and shape_of({BANDS[0]: 0.5}) is None


def test_both_ways_to_the_gains_agree_with_least_squares() -> None:
    weight, other = power_law(), rounded(power_law(), 3)
    change = Change("site", Basis.of(weight), other - weight)
    for name, gain in change.basis.gains_of(change.residual).items():
        part = change.basis.parts[name].double().numpy()
        assert gain == pytest.approx(np.linalg.lstsq(part[:, None], other.numpy().ravel(), rcond=None)[0][0], abs=1e-5)
        assert change.gains[name] == pytest.approx(gain, abs=1e-5)
    level = level_of(change.gains, change.basis.energy)
    assert level == pytest.approx(float((weight * other).sum() / (weight**2).sum()))


def test_shape_is_a_log_ratio_with_a_floor() -> None:
    assert shape_of(dict(zip(BANDS, (0.9, 5.0, 0.6), strict=True))) == pytest.approx(math.log(0.6 / 0.9))
    assert shape_of(dict(zip(BANDS, (1.0, 1.0, -0.2), strict=True))) == pytest.approx(math.log(FLOOR))
    assert shape_of(dict(zip(BANDS, (-0.1, 1.0, 0.2), strict=True))) is None


@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (90, 90)])
@pytest.mark.parametrize("size", [1e-6, 0.01, 0.5])
def test_principal_angles_are_those_of_scipy(shape: tuple[int, int], size: float) -> None:
    weight = power_law(*shape)
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=shape))
    other = weight + size * noise / noise.norm() * weight.norm()
    one, two, exact = Basis.of(weight), Spectrum.of(other), Basis.of(other)
    mine, theirs = (one.v, exact.v) if shape[0] >= shape[1] else (one.u, exact.u)
    np.testing.assert_allclose(two.s, exact.s, rtol=1e-9)
    for name, part in bands(min(shape)).items():
        wanted = scipy.linalg.subspace_angles(mine[:, part].numpy(), theirs[:, part].numpy())
        angles = one.angles(two)[name].numpy()
        np.testing.assert_allclose(angles, wanted[: len(angles)], rtol=1e-6, atol=1e-12)
    assert all(angle.max() < 1e-7 for angle in one.angles(Spectrum.of(weight)).values())


def test_a_turned_subspace_has_the_angle_that_turned_it() -> None:
    u, v = (np.linalg.qr(np.random.default_rng(k).normal(size=(20, 20)))[0] for k in (0, 1))
    s = np.linspace(20, 1, 20)
    turned, angle = v.copy(), 0.3
    turned[:, 7], turned[:, 8] = (
        math.cos(angle) * v[:, 7] + math.sin(angle) * v[:, 8],
        math.cos(angle) * v[:, 8] - math.sin(angle) * v[:, 7],
    )
    one, two = Basis.of(torch.from_numpy(u * s @ v.T)), Spectrum.of(torch.from_numpy(u * s @ turned.T))
    assert float(one.angles(two)["ranks 0-8"][0]) == pytest.approx(angle)
    assert float(one.angles(two)["ranks 0-8"][1]) == pytest.approx(0, abs=1e-7)


def test_energy_removed_and_sqnr_of_a_scaled_band() -> None:
    weight = power_law()
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    other = torch.from_numpy(u * np.r_[s[:8], 1.1 * s[8:64], 0.5 * s[64:]] @ vt)
    change = Change("site", Basis.of(weight), other - weight)
    assert change.removed() == pytest.approx({BANDS[0]: 0, BANDS[1]: 1 - 1.21, BANDS[2]: 0.75}, abs=1e-9)
    assert change.sqnr(slice(64, 96)) == pytest.approx(20 * math.log10(2))
    assert change.sqnr(slice(8, 64)) == pytest.approx(20)
