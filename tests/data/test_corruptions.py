"""Corruptions: statistics against the published code, formulas against libraries, chance from the seed."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from qclip.data import corruptions
from qclip.data.corruptions import SEVERITIES, apply, blur, colour, filters, glass, ice, spatter, weather
from qclip.errors import DataError
from tests.data.corruption_statistics import DRAWS, SIDES, images, radial_slope, reference, statistics

LOOSE = ("glass_blur", "snow", "fog", "spatter")  # 5 %, the others 2 %
NOT_MONOTONE = ("elastic_transform", "snow", "saturate")
NAMES = [name for name in corruptions.OWN if name != corruptions.GENERATED]


def drawn(side: int, name: str, severity: int):
    for draw in range(DRAWS.get(name, 1)):
        for number, image in enumerate(images(side)):
            yield image, apply(image, name, severity, seed=0, image_id=1000 * draw + number)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_published_code(name: str, side: int) -> None:
    wanted = reference()[str(side)][name]
    found = [statistics(drawn(side, name, severity)) for severity in SEVERITIES]
    tolerance = 0.05 if name in LOOSE else 0.02
    for severity, ours, theirs in zip(SEVERITIES, found, wanted, strict=True):
        for key, value in theirs.items():
            near = tolerance * (max(abs(value), 1) if key == "slope" else abs(value))  # a slope of 0 is white
            assert ours[key] == pytest.approx(value, abs=near), f"{name} {severity} at {side}: {key}"
    if name not in NOT_MONOTONE:
        psnr = [each["psnr"] for each in wanted]
        rising = [i for i in range(4) if psnr[i + 1] < psnr[i] - 0.1]
        assert rising and all(found[i + 1]["psnr"] < found[i]["psnr"] for i in rising)


def test_generated_ice_has_the_colours_deviations_and_spectra_that_were_measured() -> None:
    for (mean, _, share), wanted in zip(
        ice.LOOKS, ((0.31, 0.59, 0.65), (0.79, 0.81, 0.84), (0.54, 0.60, 0.65), (0.44, 0.48, 0.53)), strict=True
    ):
        assert mean == wanted and share == (0.4 if mean[0] == 0.79 else 0.2)
    means, looks = [], np.array([look[0] for look in ice.LOOKS])
    for seed in range(25):
        found = ice.ice(224, 224, np.random.default_rng(seed)).clip(0, 1)
        mean = found.mean((0, 1))
        assert np.abs(looks - mean).max(1).min() < 0.03
        assert 0.06 <= found.std((0, 1)).min() and found.std((0, 1)).max() <= 0.17
        assert -0.9 <= radial_slope([found.mean(2)]) <= -0.5
        means.append(np.abs(looks - mean).max(1).argmin())
    assert set(means) == {0, 1, 2, 3}


@pytest.mark.parametrize("side", SIDES)
def test_frost_gen_adds_its_ice_in_the_published_shares_and_is_not_called_frost(side: int) -> None:
    mild, strong = (statistics(drawn(side, "frost_gen", severity))["psnr"] for severity in (1, 5))
    assert strong < mild - 1
    image = images(side)[0]
    own, frozen = weather.FrostGen.large[2] if side > 64 else weather.FrostGen.small[2]
    rng = corruptions.chance("frost_gen", 3, 0, 7)
    expected = own * (image / 255) + frozen * ice.ice(side, side, rng)
    near = np.abs(apply(image, "frost_gen", 3, 0, 7) / 255 - expected.clip(0, 1))
    assert near.max() <= 0.51 / 255
    with pytest.raises(DataError, match="unknown corruption 'frost'.*'frost_gen'"):
        apply(image, "frost", 1, 0)


def small_image(height: int = 20, width: int = 26) -> np.ndarray:
    image = np.random.default_rng(4).integers(0, 256, (height, width, 3), np.uint8)
    image[0, :3], image[1, :3], image[2, :3] = 0, 255, 77  # black, white, grey
    return image


def by_hsv(image: np.ndarray, change) -> np.ndarray:
    pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in image.reshape(-1, 3) / 255]
    return np.array(pixels).reshape(image.shape)


def unrounded(kind: type, image: np.ndarray, severity: int) -> np.ndarray:
    return kind()(image / 255, severity, True, np.random.default_rng(0))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_formulas_without_chance(severity: int) -> None:
    image = small_image()
    plus = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    brighter = by_hsv(image, lambda h, s, v: (h, s, min(v + plus, 1)))
    np.testing.assert_allclose(unrounded(colour.Brightness, image, severity), brighter, atol=1e-12)
    a, b = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    saturated = by_hsv(image, lambda h, s, v: (h, min(s * a + b, 1), v))
    np.testing.assert_allclose(unrounded(colour.Saturate, image, severity), saturated, atol=1e-12)
    less = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    mean = image.reshape(-1, 3).mean(0)
    expected = (mean + less * (image - mean)) / 255
    np.testing.assert_allclose(unrounded(colour.Contrast, image, severity), expected, atol=1e-12)
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]
    fewer = Image.fromarray(image).resize((int(26 * share), int(20 * share)), Image.Resampling.BOX)
    np.testing.assert_array_equal(
        apply(image, "pixelate", severity, 0), np.asarray(fewer.resize((26, 20), Image.Resampling.BOX))
    )
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
    np.testing.assert_array_equal(apply(image, "jpeg_compression", severity, 0), np.asarray(Image.open(stream)))


def test_gaussian_noise_has_the_pixels_that_it_always_had() -> None:
    image, rng = small_image(), corruptions.chance("gaussian_noise", 2, 3, 5)
    expected = np.rint(np.clip(image / 255 + 0.06 * rng.standard_normal(image.shape), 0, 1) * 255)
    np.testing.assert_array_equal(apply(image, "gaussian_noise", 2, 3, 5), expected)


def field(height: int = 30, width: int = 41) -> np.ndarray:
    return np.random.default_rng(8).random((height, width), np.float32)


@pytest.mark.parametrize("border, theirs", [("nearest", "nearest"), ("mirror", "reflect")])
@pytest.mark.parametrize("sigma", [0.4, 2.0, 25.0])
def test_smooth_is_the_gaussian_filter_of_scipy(sigma: float, border: str, theirs: str) -> None:
    found = filters.smooth(filters.planes(field()), sigma, 3.0, border)[0].numpy()
    np.testing.assert_allclose(
        found, scipy.ndimage.gaussian_filter(field(), sigma, mode=theirs, truncate=3.0), atol=1e-5
    )


def test_convolution_has_the_mirrored_border_of_opencv() -> None:
    kernel = blur.disk(8, 0.5)
    spectrum = filters.kernel_spectrum(kernel, 30, 41)
    found = filters.convolve(filters.planes(field()), spectrum, len(kernel) // 2)[0].numpy()
    np.testing.assert_allclose(found, scipy.ndimage.convolve(field(), kernel, mode="mirror"), atol=1e-5)


def test_disks_are_softened_only_by_a_few_pixels() -> None:
    for radius, soft, width in ((3, 0.1, 17), (8, 0.5, 17), (10, 0.5, 21)):
        found = blur.disk(radius, soft)
        y, x = np.mgrid[-(width // 2) : width // 2 + 1, -(width // 2) : width // 2 + 1]
        inside = np.hypot(x, y) <= radius
        assert found.shape == (width, width) and found[np.hypot(x, y) > radius + 3].max(initial=0) < 1e-6
        np.testing.assert_allclose(found[width // 2, width // 2], 1 / inside.sum(), rtol=1e-6)
    ((y, x), found) = np.mgrid[-8:9, -8:9], blur.disk(4, 0.5)
    hard = (np.hypot(x, y) <= 4) / (np.hypot(x, y) <= 4).sum()
    np.testing.assert_allclose(found, scipy.ndimage.gaussian_filter(hard, 0.5, truncate=2, mode="mirror"), atol=1e-9)


@pytest.mark.parametrize("factor", [1.05, 1.31, 4.5])
def test_enlargements_are_the_zoom_of_scipy(factor: float) -> None:
    found = filters.enlarge(filters.planes(field(40, 40)), factor)[0].numpy()
    size = int(np.ceil(40 / factor))
    top = (40 - size) // 2
    larger = scipy.ndimage.zoom(field(40, 40)[top : top + size, top : top + size], factor, order=1)
    trim = (len(larger) - 40) // 2
    inside = slice(trim, trim + 40)
    np.testing.assert_allclose(found[:39, :39], larger[inside, inside][:39, :39], atol=1e-5)


@pytest.mark.parametrize("edge_twice, theirs", [(True, "reflect"), (False, "mirror")])
def test_samples_are_those_of_scipy(edge_twice: bool, theirs: str) -> None:
    rng = np.random.default_rng(2)
    y, x = rng.uniform(-25, 50, (30, 41)), rng.uniform(-30, 70, (30, 41))
    found = filters.sample(filters.planes(field()), torch.from_numpy(y), torch.from_numpy(x), edge_twice)[0].numpy()
    np.testing.assert_allclose(found, scipy.ndimage.map_coordinates(field(), [y, x], order=1, mode=theirs), atol=1e-4)


@pytest.mark.parametrize("angle", [-135.0, -60.0, -45.0, 0.0, 17.0, 45.0])
def test_a_smear_adds_the_pixels_behind_along_the_angle(angle: float) -> None:
    radius, sigma = 5, 3.0
    weights = np.exp(-0.5 * (np.arange(2 * radius + 1) / sigma) ** 2)
    expected = np.zeros((30, 41))
    for i, weight in enumerate(weights / weights.sum()):
        y = np.clip(np.arange(30) + int(np.ceil(i * np.sin(np.radians(angle)) - 0.5)), 0, 29)
        x = np.clip(np.arange(41) + int(np.ceil(i * np.cos(np.radians(angle)) - 0.5)), 0, 40)
        expected += weight * field()[y][:, x]
    np.testing.assert_allclose(filters.smear(filters.planes(field()), radius, sigma, angle)[0], expected, atol=1e-5)


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_copies_pixels_in_the_published_order(reach: int) -> None:
    height, width = 23, 19
    moves = np.random.default_rng(reach).integers(-reach, reach, (2, height - 2 * reach, width - 2 * reach))
    image = np.arange(height * width).reshape(height, width)
    for y in range(height - reach, reach, -1):
        for x in range(width - reach, reach, -1):
            down, right = moves[:, y - reach - 1, x - reach - 1]
            image[y, x] = image[y + down, x + right]
    np.testing.assert_array_equal(glass.sources(height, width, reach, moves), image.ravel())


def test_fog_is_smoother_where_finer_scales_shrink_more_and_spans_0_to_1() -> None:
    slopes = []
    for decay in (1.4, 2.0, 3.0):
        maps = [weather.plasma(200, decay, np.random.default_rng(seed)) for seed in range(8)]
        assert all(each.shape == (256, 256) and each.min() == 0 and each.max() == 1 for each in maps)
        slopes.append(radial_slope(maps))
    assert slopes[0] > slopes[1] + 0.3 and slopes[1] > slopes[2]


def test_distances_to_edges_are_euclidean_up_to_20_pixels() -> None:
    edges = np.random.default_rng(0).random((50, 64)) > 0.995
    edges[:, 40:] = False
    expected = np.minimum(scipy.ndimage.distance_transform_edt(~edges), spatter.FARTHEST)
    np.testing.assert_allclose(spatter._distances(edges), expected, rtol=1e-6)


def test_the_edge_of_a_square_is_a_closed_line_one_pixel_wide() -> None:
    layer = np.zeros((20, 20), np.uint8)
    layer[5:12, 6:15] = 180
    found = spatter._edges(layer)
    filled = scipy.ndimage.binary_fill_holes(found)
    assert filled[6:11, 7:14].all() and not filled[:4].any() and found.sum() < 60
    assert not spatter._edges(np.full((20, 20), 180, np.uint8)).any()


@pytest.mark.parametrize("name", corruptions.OWN)
def test_chance_is_of_image_name_severity_and_seed_alone(name: str) -> None:
    image = images(32)[1]
    torch.manual_seed(0)
    np.random.seed(0)
    first = apply(image, name, 3, 0, 9)
    assert torch.initial_seed() == 0 and np.random.random() == pytest.approx(0.5488135)  # nothing was drawn globally
    np.random.seed(5)
    apply(image, name, 4, 0, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        np.testing.assert_array_equal(first, apply(image, name, 3, 0, 9))
    finally:
        torch.set_num_threads(threads)
    calm = name in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "saturate")
    calm = calm or name == "gaussian_blur"
    for other in (apply(image, name, 3, 0, 10), apply(image, name, 3, 1, 9)):
        assert np.array_equal(first, other) == calm


@pytest.mark.parametrize("name", corruptions.OWN)
def test_any_shape_will_do_but_the_smallest(name: str) -> None:
    for shape in ((70, 40, 3), (33, 97, 3)):
        image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        for plain in (image, np.zeros_like(image), np.full_like(image, 255)):
            found = apply(plain, name, 5, 0)
            assert found.shape == shape and found.dtype == np.uint8
    if corruptions.CORRUPTIONS.get(name).least > 1:
        with pytest.raises(DataError, match=f"{name} needs .* pixels or more, not 3 x 40"):
            apply(np.zeros((3, 40, 3), np.uint8), name, 5, 0)
    else:
        assert apply(np.zeros((3, 40, 3), np.uint8), name, 5, 0).shape == (3, 40, 3)


def test_groups_stand_for_their_corruptions() -> None:
    assert corruptions.expand(["noise"]) == ("gaussian_noise", "shot_noise", "impulse_noise")
    assert corruptions.expand(["fog", "weather", "fog"]) == ("fog", "snow", "frost_gen", "brightness")
    assert corruptions.expand(["digital"]) == ("contrast", "elastic_transform", "pixelate", "jpeg_compression")
    assert corruptions.expand(["blur"]) == ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur")
    assert corruptions.expand(["validation"]) == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    published = corruptions.expand(["imagenet-c"])
    assert len(published) == 14 and "frost_gen" not in published and "speckle_noise" not in published
    assert len(corruptions.expand(["all"])) == 19 and corruptions.expand([]) == ()
    with pytest.raises(DataError, match="unknown corruption 'nois'; did you mean 'noise'"):
        corruptions.expand(["nois"])


def test_stored_as_jpeg_only_where_it_is_asked_for() -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    plain, stored = (corruptions.apply(image, "brightness", 2, seed=0, jpeg85=each) for each in (False, True))
    stream = io.BytesIO()
    Image.fromarray(plain).save(stream, "JPEG", quality=85)
    assert np.array_equal(stored, np.asarray(Image.open(stream))) and not np.array_equal(stored, plain)
    assert np.array_equal(corruptions.apply(image, "brightness", 0, seed=0, jpeg85=True), image)  # nothing is corrupted
