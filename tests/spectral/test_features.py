from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import qclip
from qclip.errors import InputError
from qclip.results import Results
from qclip.spectral import feature_spectrum, fourier, gratings, verdict
from qclip.spectral.band_accuracy import _baselines
from qclip.spectral.feature_basis import FeatureBasis, FeatureChange
from qclip.spectral.opened import opened
from qclip.spectral.pixels import Pixels
from qclip.spectral.replaced import Replaced
from qclip.spectral.resampling import counts, percentile
from tests.reliability.fakes import pictures
from tests.small import small_clip
from tests.spectral.towers import apart

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


def test_images_that_cannot_be_read_are_named_and_counted(model: nn.Module) -> None:
    data = pictures(n=80, bad=[3, 50])
    data.notes, data.label_notes = ["pets: a file was left out"], ["pets: folders are classes"]
    pixels = Pixels.read({"m": model}, data, 70, batch=32)
    assert (
        len(pixels) == len(pixels.labels) == 68
        and pixels.labels.tolist() == np.delete(data.labels[:70], [3, 50]).tolist()
    )
    said = "pets: 2 of 70 images cannot be read and are left out: row 3 is broken; row 50 is broken"
    for results in (
        feature_spectrum(model, {}, pixels),
        fourier({"m": model}, pixels.take(3)),
        gratings({"m": model}, pixels.take(3)),
    ):
        assert {said, *data.notes, *data.label_notes} <= set(results.notes)


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


def test_energies_and_slopes_by_rank_are_those_of_the_features(model: nn.Module, small: nn.Module) -> None:
    seen = {}
    for name, each in (("float", model), ("w4a8", small)):
        with opened(each) as vision:
            found = vision.see(images()).features
            seen[name] = found - found.mean(0)
    results = feature_spectrum(model, {"w4a8": small}, Pixels("noise", images()))
    for name, centred in seen.items():
        energy = np.linalg.eigvalsh(centred.T @ centred)[::-1]
        head = results.value(model=name, set="noise", metric="band_energy", axis="band", subset=BANDS[0])
        assert head == pytest.approx(energy[:8].sum() / energy.sum())
        cdf = results.curve(model=name, set="noise", metric="energy_cdf")["value"]
        np.testing.assert_allclose(cdf, np.cumsum(energy) / energy.sum(), atol=1e-9)
    v = np.linalg.svd(seen["float"])[2].T
    mine, theirs = seen["float"] @ v, seen["w4a8"] @ v
    curve = results.curve(model="w4a8", set="noise", metric="by_rank")
    np.testing.assert_allclose(curve["gain"][:10], ((mine * theirs).sum(0) / (mine**2).sum(0))[:10], rtol=1e-6)
    noise = ((theirs - mine) ** 2).sum(0)
    np.testing.assert_allclose(curve["sqnr"][:10], 10 * np.log10((mine**2).sum(0) / noise)[:10], rtol=1e-6)


def test_random_controls_are_drawn_as_often_as_asked(model: nn.Module, small: nn.Module, monkeypatch) -> None:
    put, drawn = Replaced.put, []

    def counted(self: Replaced, control, seed: int, k: int) -> None:
        drawn.append((control.name, k))
        put(self, control, seed, k)

    monkeypatch.setattr(Replaced, "put", counted)
    feature_spectrum(model, {"w4a8": small}, Pixels("noise", images(70)), controls=["white", "truncated"], seeds=9)
    assert drawn == [*(("white", k) for k in range(9)), ("truncated", 0)]


def test_each_model_has_a_basis_of_its_own_and_differences_have_a_sign(model: nn.Module) -> None:
    rough = qclip.quantize(model, "w2a8")
    with opened(model) as vision:
        answers = apart(vision.see(images()).embeddings)
        labels = (vision.see(images()).embeddings @ answers.T).argmax(1)
        v = np.linalg.svd((float_ones := vision.see(images()).features) - float_ones.mean(0))[2].T[:, :8]
    with opened(rough) as vision:
        found = vision.see(images()).features
        centred = found - found.mean(0)
        own = np.linalg.svd(centred)[2].T[:, :8]
        right = [
            float(((vision.project(found.mean(0) + centred @ b @ b.T) @ answers.T).argmax(1) == labels).mean())
            for b in (v, own)
        ]
    assert right[0] != right[1]
    results = feature_spectrum(model, {"rough": rough}, Pixels("noise", images(), labels, answers))
    head = {"set": "noise", "axis": "band", "subset": BANDS[0]}
    for metric, wanted in zip(("band_top1", "band_top1_own"), right, strict=True):
        assert results.value(model="rough", metric=metric, reference="", **head) == pytest.approx(wanted)
        ours = results.value(model="float", metric=metric, reference="", **head)
        assert ours != wanted
        gap = results.row(model="rough", metric=metric, reference="float", **head)
        assert gap["value"] == pytest.approx(wanted - ours)


def test_baselines_hold_as_many_directions_or_as_much_energy() -> None:
    centred = np.random.default_rng(0).normal(size=(50, 12)) * np.arange(1, 13) ** -1.0
    asked: list[np.ndarray] = []

    def right(directions: np.ndarray) -> np.ndarray:
        asked.append(directions)
        return np.full(50, directions.shape[1] / 100)

    results = Results()
    _baselines(results, {"model": "m", "set": "s"}, right, centred, 3, 0.7, seed=0)
    same, enough = asked[::2], asked[1::2]
    assert [q.shape[1] for q in same] == [3] * 8 and len(enough) == 8
    for q in enough:
        held = ((centred @ q) ** 2).sum(0).cumsum() / (centred**2).sum()
        assert held[-1] >= 0.7 and (len(held) == 1 or held[-2] < 0.7)
    assert results.value(metric="band_top1_random") == pytest.approx(0.03)
    assert results.value(metric="band_top1_energy") == pytest.approx(np.mean([q.shape[1] for q in enough]) / 100)
