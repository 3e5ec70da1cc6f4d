"""Altered images: what each keeps, what it loses, and that chance is the generator's alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qclip import seeds
from qclip.data.corruptions import OWN
from qclip.training import alterations
from qclip.training.alterations import NEGATIVES, VIEWS, bounds_of

IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 - 1
BOUNDS = bounds_of(IMAGES)
X = IMAGES[0]


def chance(seed: int = 0) -> np.random.Generator:
    return seeds.generator(seed, "alterations")


@pytest.mark.parametrize("alter", [*VIEWS, *NEGATIVES], ids=lambda f: f.__name__)
def test_the_generator_decides_and_nothing_else(alter: alterations.Alteration) -> None:
    before = X.clone()
    found = alter(X, BOUNDS, chance())
    torch.manual_seed(5)
    assert torch.equal(found, alter(X, BOUNDS, chance())) and torch.equal(X, before)
    assert found.shape == X.shape and found.isfinite().all() and found.dtype == X.dtype
    assert not torch.equal(found, X) and not torch.equal(found, alter(X, BOUNDS, chance(1)))


def test_none_is_a_corruption_that_is_measured() -> None:
    assert not {each.__name__ for each in VIEWS} & set(OWN)


def test_waves_add_few_frequencies() -> None:
    for seed in range(8):
        off = (alterations.waves(X, BOUNDS, chance(seed)) - X) / (BOUNDS[1] - BOUNDS[0])
        assert 0.019 < off.square().mean().sqrt() < 0.201
        power = torch.fft.fft2(off).abs().square().flatten(1).sort(descending=True).values
        assert power[:, :80].sum() / power.sum() > 0.8  # of 1,024: four waves, each spread by the edges; noise has 0.3


def test_spectrum_keeps_phases_and_mean() -> None:
    found = alterations.spectrum(X, BOUNDS, chance())
    torch.testing.assert_close(found.mean((1, 2)), X.mean((1, 2)))
    inner = (slice(None), slice(None), slice(1, 16))  # of the others a real image's are not free
    turned = torch.fft.rfft2(found)[inner] / torch.fft.rfft2(X)[inner]
    assert turned.angle().abs().max() < 1e-6 and turned.abs().log().std() > 0.2


def test_levels_are_few() -> None:
    for seed in range(5):
        assert {len(channel.unique()) for channel in alterations.levels(X, BOUNDS, chance(seed))} <= set(range(2, 9))


def test_shuffled_keeps_pixels_and_moves_them() -> None:
    found = alterations.shuffled(X, BOUNDS, chance())
    assert torch.equal(found.flatten(1).sort().values, X.flatten(1).sort().values)
    assert (found != X).double().mean() > 0.5
    odd = torch.rand(3, 33, 35)
    assert torch.equal(
        alterations.shuffled(odd, BOUNDS, chance()).flatten(1).sort().values, odd.flatten(1).sort().values
    )


def test_scrambled_keeps_amplitudes() -> None:
    found = alterations.scrambled(X, BOUNDS, chance())
    inner = (slice(None), slice(None), slice(1, 16))
    torch.testing.assert_close(torch.fft.rfft2(found)[inner].abs(), torch.fft.rfft2(X)[inner].abs())
    torch.testing.assert_close(found.mean((1, 2)), X.mean((1, 2)))


def test_texture_has_mean_and_contrast_of_its_image_and_one_colour() -> None:
    found = alterations.texture(X, BOUNDS, chance())
    torch.testing.assert_close(found.mean((1, 2)), X.mean((1, 2)))
    flat = (found - found.mean((1, 2), keepdim=True)).flatten(1)
    assert torch.linalg.matrix_rank(flat, rtol=1e-6) == 1


def test_gratings_are_of_two_colours() -> None:
    for seed in range(5):
        found = alterations.gratings(X, BOUNDS, chance(seed))
        assert len(found.flatten(1).T.round(decimals=6).unique(dim=0)) <= 3  # and where a stripe's edge is a pixel


def test_cut_is_half_of_each() -> None:
    for seed in range(5):
        found = alterations.cut(X, IMAGES[1], chance(seed))
        other = found == IMAGES[1]
        assert torch.equal(torch.where(other, IMAGES[1], X), found)
        assert 0.35 < other.double().mean() < 0.6


def test_a_crop_shows_a_part_of_its_image_at_its_size() -> None:
    rows, columns = torch.arange(32.0)[:, None], torch.arange(32.0)
    place = torch.stack([rows.expand(32, 32), columns.expand(32, 32), rows + columns])  # what a pixel says of itself
    flipped, areas = set(), []
    for seed in range(30):
        found = alterations.crop(place, chance(seed))
        assert found.shape == place.shape and found.isfinite().all()
        down, along = found[0].diff(dim=0)[4:-4, 4:-4], found[1].diff(dim=1)[4:-4, 4:-4]  # pixels of it per pixel
        assert down.std() < 0.2 and (down > 0.3).all() and (down < 1.05).all()
        assert (along.abs() > 0.3).all() and (along.abs() < 1.05).all()
        flipped.add(bool(along.mean() < 0))
        areas.append(float(down.mean() * along.mean().abs()))
        torch.testing.assert_close(found[0] + found[1], found[2])  # all channels alike
    assert flipped == {True, False} and min(areas) > 0.2 and min(areas) < 0.45 and max(areas) > 0.8


def test_a_mixture_is_a_crop_or_holds_another_image_too() -> None:
    dark, bright = torch.zeros(3, 32, 32), torch.ones(3, 32, 32)
    bounds = bounds_of(torch.stack([dark, bright]))
    shares = [alterations.mixture(dark, bright, bounds, chance(seed)) for seed in range(60)]
    plain = [x for x in shares if not x.any()]
    blended = [x for x in shares if x.std() < 1e-6 and x.any()]
    cut = [x for x in shares if x.std() > 0.1]
    assert 25 <= len(plain) <= 50 and len(blended) >= 4 and len(cut) >= 4
    assert len(plain) + len(blended) + len(cut) == 60
    assert all(0.1 <= float(x.mean()) <= 0.5 for x in blended)


def test_what_is_drawn_stays_within_the_bounds_and_is_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = BOUNDS
    seen = []

    def watched(kind: alterations.Alteration) -> alterations.Alteration:
        def call(x: Tensor, bounds: alterations.Bounds, generator: np.random.Generator) -> Tensor:
            seen.append(kind.__name__)
            return kind(x, bounds, generator)

        return call

    monkeypatch.setattr(alterations, "VIEWS", tuple(map(watched, VIEWS)))
    monkeypatch.setattr(alterations, "NEGATIVES", tuple(map(watched, NEGATIVES)))
    for seed in range(60):
        for found in (
            alterations.view(X, BOUNDS, chance(seed)),
            alterations.negative(X, IMAGES[1], BOUNDS, chance(seed)),
        ):
            assert (found >= low).all() and (found <= high).all()
    assert set(seen) == {kind.__name__ for kind in (*VIEWS, *NEGATIVES)}


def test_looks_are_the_image_its_mirror_and_both_shifted() -> None:
    found = alterations.looks(IMAGES)
    assert len(found) == 6 and torch.equal(found[0], IMAGES) and torch.equal(found[1], IMAGES.flip(-1))
    assert torch.equal(found[2][..., 2:, 2:], IMAGES[..., :-2, :-2])
    assert torch.equal(found[5][..., :-2, :-2], IMAGES.flip(-1)[..., 2:, 2:])
