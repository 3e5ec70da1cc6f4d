from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import qclip
from qclip.errors import InputError
from qclip.spectral import feature_spectrum, verdict
from qclip.spectral.feature_basis import FeatureBasis, FeatureChange
from qclip.spectral.opened import opened
from qclip.spectral.pixels import Pixels
from qclip.spectral.resampling import counts, percentile
from tests.small import small_clip

BANDS = ("ranks 0-8", "ranks 8-64", "ranks 64-")


def images(n: int = 96, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).split(32))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_clip()


@pytest.fixture(scope="module")
def small(model: nn.Module) -> nn.Module:
    return qclip.quantize(model, "w4a8")


def features(n: int = 300, d: int = 80, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 3 + rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -0.7 @ np.linalg.qr(rng.normal(size=(d, d)))[0]


def test_what_is_seen_projects_to_the_embeddings(model: nn.Module, small: nn.Module) -> None:
    for each in (model, small):
        wanted = torch.cat([qclip.encoders(each).encode_image(part) for part in images()]).double().detach()
        before = {name: type(module) for name, module in each.named_modules()}
        with opened(each) as vision:
            seen = vision.see(images())
            projected = vision.project(seen.features)
        assert seen.features.shape == (96, 64) and seen.embeddings.shape == (96, 48)
        np.testing.assert_allclose(seen.embeddings, wanted / wanted.norm(dim=1, keepdim=True), atol=1e-5)
        np.testing.assert_allclose(projected, seen.embeddings, atol=1e-5)
        assert {name: type(module) for name, module in each.named_modules()} == before
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in each.modules())


def test_slopes_and_noise_have_their_known_values() -> None:
    float_ones = features()
    basis, drawn = FeatureBasis.of(float_ones), counts(300, np.random.default_rng(1))
    factors = np.r_[np.full(8, 0.9), np.full(56, 1.1), np.full(16, 0.5)]
    noise = np.random.default_rng(2).normal(size=(300, 80)) * 0.01
    other = (basis.scores * factors + noise) @ basis.v.T + 7
    change = FeatureChange.of(basis, other)
    gains = {band: values[0] for band, values in change.gains(drawn).items()}
    for band, part in basis.bands.items():
        mine, theirs = basis.scores[:, part].ravel(), ((other - other.mean(0)) @ basis.v)[:, part].ravel()
        assert gains[band] == pytest.approx((mine @ theirs) / (mine @ mine))
        assert gains[band] == pytest.approx(factors[part][0], abs=0.01)
    assert change.shape(drawn)[0] == pytest.approx(np.log(gains[BANDS[2]] / gains[BANDS[0]]))
    energy = ((factors - 1) * basis.scores)[:, :8]
    error = ((other - other.mean(0)) @ basis.v)[:, :8] - basis.scores[:, :8]
    assert change.sqnr(drawn)[BANDS[0]][0] == pytest.approx(
        10 * np.log10((basis.scores[:, :8] ** 2).sum() / (error**2).sum())
    )
    assert (error**2).sum() == pytest.approx((energy**2).sum(), rel=0.1)
    spread = np.sqrt((basis.scores**2).sum(1).mean())
    assert change.shift == pytest.approx(np.linalg.norm(other.mean(0) - float_ones.mean(0)) / spread)


def test_intervals_are_those_of_resampled_images() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = percentile(counts(400, np.random.default_rng(1)) @ values / 400)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_more_images_than_features_are_needed(model: nn.Module) -> None:
    with pytest.raises(InputError, match="64 images are too few for the spectrum of 64 features; give more than 64"):
        feature_spectrum(model, {}, Pixels("noise", images(64)))


def test_rows_of_features_and_their_controls(model: nn.Module, small: nn.Module) -> None:
    pixels = Pixels("noise", images())
    results = feature_spectrum(model, {"w4a8": small}, pixels, controls=["white", "truncated"])
    where = {"model": "w4a8", "set": "noise"}
    for band in BANDS[:2]:
        row = results.row(**where, metric="gain", axis="band", subset=band)
        assert row["low"] < row["value"] < row["high"] and row["value"] == pytest.approx(1, abs=0.3)
    assert results.value(**where, metric="mean_shift") > 0
    cdf = results.curve(model="float", set="noise", metric="energy_cdf")
    assert len(cdf["value"]) == 64 and cdf["value"][-1] == pytest.approx(1) and np.all(np.diff(cdf["value"]) >= 0)
    own, control, gap = (
        results.row(**where, metric="shape", **more)
        for more in ({}, {"axis": "control", "at": "truncated"}, {"reference": "truncated"})
    )
    assert gap["value"] == pytest.approx(own["value"] - control["value"]) and own["role"] == "id"
    assert results.row(**where, metric="shape", axis="control", at="white")["low"] < control["value"] + 1
    (said,) = verdict(results.rows)
    assert said.startswith("w4a8, features on noise, ranks 8-64: ") and said.endswith("(96 images).")


def test_accuracy_inside_bands(model: nn.Module, small: nn.Module) -> None:
    """Labels are the float model's own answers, so that all ranks together are always right."""
    with opened(model) as vision:
        seen = vision.see(images())
        answers = np.random.default_rng(0).normal(size=(5, 48))
        answers /= np.linalg.norm(answers, axis=1, keepdims=True)
        labels = (seen.embeddings @ answers.T).argmax(1)
        centred = seen.features - seen.features.mean(0)
        v = np.linalg.svd(centred)[2].T[:, :8]
        embedded = vision.project(seen.features.mean(0) + centred @ v @ v.T)
    pixels = Pixels("noise", images(), labels, answers)
    results = feature_spectrum(model, {"w4a8": small}, pixels)
    head = {"set": "noise", "axis": "band", "subset": BANDS[0]}
    wanted = float(((embedded @ answers.T).argmax(1) == labels).mean())
    assert results.value(model="float", metric="band_top1", **head) == pytest.approx(wanted)
    assert results.value(model="float", metric="band_top1_own", **head) == pytest.approx(wanted)  # one basis
    gap = results.row(model="w4a8", metric="band_top1", reference="float", **head)
    both = [results.value(model=m, metric="band_top1", **head) for m in ("w4a8", "float")]
    assert gap["value"] == pytest.approx(both[0] - both[1]) and gap["low"] <= gap["value"] <= gap["high"]
    for name in ("band_top1_random", "band_top1_energy"):
        row = results.row(model="float", metric=name, **head)
        assert 0 <= row["value"] <= 1 and row["n"] == 8
    tail = {"set": "noise", "axis": "band", "subset": BANDS[1]}
    random = results.value(model="float", metric="band_top1_random", **tail)
    assert random > 0.8  # 56 of 64 directions hold nearly everything
