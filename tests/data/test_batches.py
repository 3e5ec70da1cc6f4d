"""Batches and corruptions: order, unreadable images, and noise that is the same whatever surrounds it."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from qclip.data import Crops, ImageSet, UnreadableImage, batches, corruptions, decoding, load
from qclip.data.corruptions.noise import GaussianNoise
from qclip.data.workers import pool
from qclip.errors import DataError

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
PREPROCESS = transforms.Compose(
    [transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
)


class Pictures:
    """Images in memory; None is an unreadable one."""

    def __init__(self, images):
        self.images = images

    def read(self, rows):
        return [UnreadableImage(f"row {r}: broken.") if self.images[r] is None else self.images[r] for r in rows]


def picture_set(images) -> ImageSet:
    n = len(images)
    return ImageSet("p", "p", None, None, None, {}, None, Pictures(images), np.arange(n, dtype=np.int64))


def grey(*values, side=32):
    return [None if v is None else Image.new("RGB", (side, side), (v, v, v)) for v in values]


def pixels(tensor) -> torch.Tensor:
    return (tensor * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255


def test_batches_keep_the_order_and_the_last_is_short():
    data = load("scenes:test?samples=10")
    found = list(batches(data, PREPROCESS, size=4))
    assert [len(i) for i, _ in found] == [4, 4, 2] and np.concatenate([i for i, _ in found]).tolist() == list(range(10))
    for index, images in found:
        for i, image in zip(index, images, strict=True):
            torch.testing.assert_close(image, PREPROCESS(data.image(i)))
    assert found[0][1].shape == (4, 3, 32, 32)


def test_unreadable_images_are_left_out_counted_and_counted_once():
    data = picture_set(grey(1, None, 3, None, None, 6))
    for _ in range(2):
        found = list(batches(data, PREPROCESS, size=2))
        assert [i.tolist() for i, _ in found] == [[0], [2], [5]]
        assert data.unreadable == [(1, "row 1: broken."), (3, "row 3: broken."), (4, "row 4: broken.")]
    with pytest.raises(UnreadableImage, match="row 1"):
        list(batches(data, PREPROCESS, size=2, strict=True))


def test_empty_unreadable_and_impossible_requests_are_refused():
    with pytest.raises(DataError, match="no images to read"):
        batches(picture_set([]), PREPROCESS)
    with pytest.raises(DataError, match="none of its 2 images can be read; the first: row 0"):
        list(batches(picture_set(grey(None, None)), PREPROCESS))
    with pytest.raises(DataError, match="batch of 0"):
        batches(picture_set(grey(1)), PREPROCESS, size=0)
    with pytest.raises(DataError, match="unknown corruption 'gausian_noise'; did you mean 'gaussian_noise'"):
        batches(picture_set(grey(1)), PREPROCESS, corruption="gausian_noise", severity=1)
    with pytest.raises(DataError, match="severities 1 to 5"):
        batches(picture_set(grey(1)), PREPROCESS, corruption="gaussian_noise", severity=6)


def test_a_fault_in_preprocess_is_not_swallowed_and_no_thread_stays():
    def broken(image):
        raise RuntimeError("preprocess fault")

    with pytest.raises(RuntimeError, match="preprocess fault"):
        list(batches(picture_set(grey(1, 2)), broken))
    for _ in batches(picture_set(grey(*range(20))), PREPROCESS, size=2):
        break
    assert not [t for t in threading.enumerate() if t.name.startswith("qclip-batches")]


def test_noise_depends_on_the_image_and_not_on_its_company():
    data = load("scenes:test?samples=12")
    noisy = {"corruption": "gaussian_noise", "severity": 3}
    whole = torch.cat([x for _, x in batches(data, PREPROCESS, size=5, **noisy)])
    part = data.select([9, 2, 4])
    again = torch.cat([x for _, x in batches(part, PREPROCESS, size=2, **noisy)])
    torch.testing.assert_close(again, whole[[9, 2, 4]], rtol=0, atol=0)
    other = torch.cat([x for _, x in batches(data, PREPROCESS, size=5, seed=1, **noisy)])
    assert not torch.allclose(other, whole)
    same = torch.cat([x for _, x in batches(data, PREPROCESS, corruption="gaussian_noise", severity=0)])
    torch.testing.assert_close(same, torch.stack([PREPROCESS(data.image(i)) for i in range(12)]), rtol=0, atol=0)


def test_noise_acts_on_the_crop_in_eight_bits():
    data = picture_set(grey(100, 100, side=64))
    ((_, found),) = batches(data, PREPROCESS, corruption="gaussian_noise", severity=2)
    shown = pixels(found)
    torch.testing.assert_close(shown, shown.round(), atol=1e-3, rtol=0)
    expected = corruptions.apply(np.full((32, 32, 3), 100, np.uint8), "gaussian_noise", 2, 0, image_id=1)
    np.testing.assert_array_equal(shown[1].round().permute(1, 2, 0).numpy(), expected)
    assert not torch.equal(found[0], found[1])


def test_preprocess_that_hides_the_crop_is_refused():
    with pytest.raises(DataError, match="not affine"):
        bent = lambda image: PREPROCESS(image) ** 2  # noqa: E731
        list(batches(picture_set(grey(1)), bent, corruption="gaussian_noise", severity=1))


@pytest.mark.parametrize("side, table", [(32, "small"), (64, "small"), (65, "large"), (224, "large")])
def test_gaussian_noise_has_the_published_strength(side, table):
    image = np.full((side, side, 3), 128, np.uint8)
    last = 0.0
    for severity, sigma in enumerate(getattr(GaussianNoise, table), start=1):
        found = np.stack([corruptions.apply(image, "gaussian_noise", severity, 0, i) for i in range(200 * 32 // side)])
        error = found / 255 - 128 / 255
        reference = np.random.default_rng(5).normal(size=200_000) * sigma  # clipped as the published code clips
        reference = np.clip(128 / 255 + reference, 0, 1) - 128 / 255
        assert error.std() == pytest.approx(reference.std(), rel=0.02) and abs(error.mean()) < 0.004
        assert error.std() > last
        last = error.std()


def test_tables_are_those_of_the_published_code():
    assert GaussianNoise.large == (0.08, 0.12, 0.18, 0.26, 0.38)
    assert GaussianNoise.small == (0.04, 0.06, 0.08, 0.09, 0.10)


def test_apply_is_deterministic_and_checks_its_input():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    first = corruptions.apply(image, "gaussian_noise", 4, seed=3, image_id=8)
    np.testing.assert_array_equal(first, corruptions.apply(image, "gaussian_noise", 4, seed=3, image_id=8))
    for change in ({"severity": 5}, {"seed": 4}, {"image_id": 9}):
        other = corruptions.apply(image, "gaussian_noise", **{"severity": 4, "seed": 3, "image_id": 8, **change})
        assert not np.array_equal(first, other)
    np.testing.assert_array_equal(corruptions.apply(image, "gaussian_noise", 0, 0), image)
    with pytest.raises(DataError, match="uint8 images"):
        corruptions.apply(image.astype(np.float32), "gaussian_noise", 1, 0)
    with pytest.raises(DataError, match="severities 1 to 5"):
        corruptions.apply(image, "gaussian_noise", -1, 0)


def test_decode_gives_rgb_for_every_mode():
    for mode, kind in (("L", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")):
        stream = io.BytesIO()
        Image.new(mode, (4, 4), "red" if mode == "RGBA" else 0).save(stream, kind)
        assert decoding.decode(stream.getvalue(), "x").mode == "RGB"


def test_workers_compute_on_one_core_each_and_leave_the_callers_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pool(3, "cores") as workers:
            together = threading.Barrier(3)  # all three, not one of them three times

            def threads(_) -> int:
                together.wait()
                return torch.get_num_threads()

            assert list(workers.map(threads, range(3))) == [1, 1, 1]
        assert torch.get_num_threads() == 2
        later = []
        other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert later == [2]
    finally:
        torch.set_num_threads(before)


def test_an_image_is_decoded_once_for_all_its_corruptions():
    class Counted(Pictures):
        reads = 0

        def digest(self, rows):
            return f"{id(self)} {rows}"

        def read(self, rows):
            Counted.reads += len(rows)
            return super().read(rows)

    data = picture_set([])
    data.source, data.rows = Counted(grey(10, None, 200, 90, 40)), np.array([4, 1, 0, 2])
    crops = Crops()

    def run(severity, kept, of=data):
        found = batches(of, PREPROCESS, size=3, corruption="impulse_noise", severity=severity, crops=kept)
        return torch.cat([images for _, images in found]), list(of.unreadable)

    alone = [run(severity, None) for severity in (2, 5)]
    Counted.reads = 0
    for severity, (images, unreadable) in zip((2, 5), alone, strict=True):
        again = run(severity, crops)
        torch.testing.assert_close(again[0], images, rtol=0, atol=0)
        assert again[1] == unreadable == [(1, "row 1: broken.")]
    assert Counted.reads == 4
    run(2, crops, data.select([2, 3]))
    assert Counted.reads == 6  # other images
    run(5, crops)
    assert Counted.reads == 10  # only the last set is kept
    few = Crops(most=3 * 32 * 32)
    for severity in (2, 5):
        run(severity, few)
    assert (
        Counted.reads == 10 + 4 + 3
    )  # the first batch, of two images, is too large for it; the second, of one, is kept
