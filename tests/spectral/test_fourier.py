from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import qclip
from qclip.spectral import fourier, gratings
from qclip.spectral.fourier import diagonal, frequencies, radial, radius
from qclip.spectral.gratings import grating
from qclip.spectral.opened import Vision, opened
from qclip.spectral.pixels import Pixels
from tests.small import small_clip
from tests.spectral.towers import apart


def images(n: int = 24) -> list[torch.Tensor]:
    return list(torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(8))


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    model = small_clip()
    return {"float": model, "w8a8": qclip.quantize(model, "w8a8")}


def wave(size: int, u: int, v: int, d: int = 3) -> torch.Tensor:
    """Tokens `[1, 1 + size^2, d]` whose patches are one plane wave, behind a CLS token of another size."""
    rows = torch.arange(size) / size
    plane = torch.cos(2 * torch.pi * (u * rows[:, None] + v * rows[None]))
    patches = plane.flatten()[:, None].expand(-1, d)
    return torch.cat([torch.full((1, d), 1e6), patches])[None]


def test_a_plane_wave_stands_at_its_frequency_and_cls_is_left_out(models: dict[str, nn.Module]) -> None:
    with opened(models["float"]) as vision:  # 4 x 4 patches
        found = vision._amplitudes(wave(4, 1, 0))[0]
    u, v = frequencies((4, 4))
    top = {(float(u[i, j]), float(v[i, j])) for i, j in np.argwhere(found > found.max() - 1)}
    assert top == {(0.25, 0.0), (-0.25, 0.0)}
    assert found.max() == pytest.approx(np.log(8)) and found.min() == pytest.approx(np.log(1e-6), abs=0.5)


def test_the_logarithm_comes_before_the_mean_over_channels(models: dict[str, nn.Module]) -> None:
    tokens = torch.zeros(1, 17, 2)
    tokens[0, 1:, 0], tokens[0, 1:, 1] = 1.0, 100.0  # frequency 0: 16 and 1,600
    with opened(models["float"]) as vision:
        assert vision._amplitudes(tokens)[0, 2, 2] == pytest.approx((np.log(16) + np.log(1600)) / 2)


def test_feature_maps_are_taken_as_they_are() -> None:
    maps = torch.randn(2, 5, 6, 4)
    wanted = np.fft.fftshift(np.log(np.abs(np.fft.fft2(maps.numpy())) + 1e-6).mean(1), axes=(1, 2))
    np.testing.assert_allclose(Vision._amplitudes(None, maps), wanted, atol=1e-4)  # type: ignore[arg-type]


def test_frequencies_are_true_ones() -> None:
    amplitude = -radius((14, 14))  # minus the frequency itself
    curve = diagonal(amplitude)
    assert curve["frequency"][-1] == pytest.approx(6 / 7) and len(curve["frequency"]) == 7
    assert curve["value"][-1] == pytest.approx(-np.sqrt(2) * 6 / 7)
    rings = radial(amplitude)
    assert rings["frequency"][-1] == 1 and rings["value"][0] == 0
    np.testing.assert_allclose(rings["value"], -np.array(rings["frequency"]), atol=0.08)
    assert len(diagonal(np.zeros((7, 7)))["value"]) == 4


def test_fourier_rows_and_curves(models: dict[str, nn.Module]) -> None:
    results = fourier(models, Pixels("noise", images()))
    blocks = {curve["at"] for curve in results.curves if curve["metric"] == "fourier_radial"}
    assert blocks == {"vision.blocks.0", "vision.blocks.1"}
    points = results.curve(model="float", metric="fourier_map", set="noise")
    assert len(points["value"]) == 16 and min(points["u"]) == -0.5
    value = np.reshape(points["value"], (4, 4))
    high = radius((4, 4)) >= 0.5
    row = results.row(model="float", metric="high_frequency", set="noise")
    assert row["value"] == pytest.approx(value[high].mean() - value[2, 2]) and row["low"] < row["value"] < row["high"]
    gap = results.row(model="w8a8", metric="high_frequency", set="noise", reference="float")
    theirs = results.value(model="w8a8", metric="high_frequency", set="noise", reference="")
    assert gap["value"] == pytest.approx(theirs - row["value"]) and gap["value"] != 0
    assert abs(gap["value"]) < 0.05 and gap["high"] - gap["low"] < row["high"] - row["low"]  # paired


@pytest.mark.parametrize("cycles", [1, 5, 16])
def test_gratings_have_one_norm_and_one_frequency(cycles: int) -> None:
    found = grating((32, 32), 40, cycles, np.random.default_rng(0))
    np.testing.assert_allclose((found**2).mean((1, 2, 3)), 1, rtol=1e-4)
    energy = torch.fft.fft2(found).abs()[:, 0]
    place = torch.stack([torch.tensor(divmod(int(each.argmax()), 32)) for each in energy])
    place = torch.where(place > 16, place - 32, place).float()
    assert (place.norm(dim=1) - cycles).abs().max() < 1
    assert len(place.unique(dim=0)) > 2  # directions differ from image to image
    assert torch.equal(found, grating((32, 32), 40, cycles, np.random.default_rng(0)))


def test_the_response_is_that_of_the_same_grating_for_all_models(models: dict[str, nn.Module]) -> None:
    pixels = Pixels("noise", images())
    twice = {"float": models["float"], "again": models["float"], "w8a8": models["w8a8"]}
    results = gratings(twice, pixels)
    at = [row["at"] for row in results.where(model="float", metric="grating_response")]
    assert at == [1, 2, 3, 5, 9, 16]
    for r in at:
        where = {"set": "noise", "metric": "grating_response", "axis": "cycles", "at": r}
        gap = results.row(model="again", reference="float", **where)
        assert gap["value"] == gap["low"] == gap["high"] == 0
        ours, theirs = (results.value(model=m, reference="", **where) for m in ("float", "w8a8"))
        assert ours > 1e-6 and theirs != ours
        assert results.value(model="w8a8", reference="float", **where) == pytest.approx(theirs - ours)
    assert gratings(twice, pixels).rows == results.rows  # drawn from the seed
    none = gratings({"float": models["float"]}, pixels, contrast=0.0)
    assert all(abs(row["value"]) < 1e-9 for row in none)
    labels = np.zeros(24, np.int64)
    named = gratings({"float": models["float"]}, Pixels("noise", images(), labels, np.eye(3, 48)))
    assert len(named.where(metric="grating_top1").rows) == 6


def test_accuracy_falls_under_a_grating_that_changes_answers(models: dict[str, nn.Module]) -> None:
    """Labels are the float model's own answers: without a grating it is always right."""
    with opened(models["float"]) as vision:
        answers = apart(vision.see(images()).embeddings)
        labels = (vision.see(images()).embeddings @ answers.T).argmax(1)
    pixels = Pixels("noise", images(), labels, answers)
    lost = [
        row["value"] for row in gratings({"float": models["float"]}, pixels, contrast=20.0).where(metric="grating_top1")
    ]
    assert max(lost) <= 0 and min(lost) < 0


def test_contrast_is_in_units_of_the_images_own_spread(models: dict[str, nn.Module]) -> None:
    """Ten times the contrast is another grating; images of a tenth of the spread get a tenth of it."""
    faint = [batch * 0.1 for batch in images()]
    moved: list[torch.Tensor] = []
    see = Vision.see

    def watched(self: Vision, batches, fourier: bool = False):
        moved.append(torch.cat(list(batches)))
        return see(self, batches, fourier)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Vision, "see", watched)
        gratings({"float": models["float"]}, Pixels("faint", faint), contrast=0.5)
    plain, first = moved[:2]
    added = (first - plain).square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(added, 0.5 * plain.std(dim=(0, 2, 3)), rtol=1e-3, atol=0)
