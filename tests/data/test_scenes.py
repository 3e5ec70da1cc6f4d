"""The generated benchmark: determinism, labels that tell the truth, groups, refusals."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from qclip.data import drawing, load, scenes
from qclip.errors import DataError

SPLITS = list(scenes.SIZES)


@pytest.mark.parametrize("split", SPLITS)
def test_an_image_is_the_same_alone_and_in_any_company(split):
    together = scenes.draw(split, range(40))
    for i in (0, 7, 39):
        np.testing.assert_array_equal(scenes.draw(split, [i])[0], together[i])
    np.testing.assert_array_equal(scenes.draw(split, [39, 3, 7]), together[[39, 3, 7]])
    assert len({hashlib.sha256(x.tobytes()).hexdigest() for x in together}) == 40


def test_seed_split_and_index_all_matter():
    base = scenes.draw("test", range(4))
    assert not np.array_equal(base, scenes.draw("test", range(4), seed=1))
    assert not np.array_equal(base, scenes.draw("dev", range(4)))
    assert not np.array_equal(base, scenes.draw("test", range(4, 8)))


def test_odd_sizes_and_blocks_change_nothing(monkeypatch):
    whole = scenes.draw("test", range(9), side=33)
    assert whole.shape == (9, 33, 33, 3) and whole.dtype == np.uint8
    monkeypatch.setattr(scenes, "_BLOCK_PIXELS", 2 * 33 * 33)
    np.testing.assert_array_equal(scenes.draw("test", range(9), side=33), whole)


def test_a_larger_picture_shows_the_same_scene():
    small, large = scenes.draw("test", range(20)), scenes.draw("test", range(20), side=128)
    pooled = large.reshape(20, 32, 4, 32, 4, 3).mean((2, 4))
    near = np.abs(pooled - small).mean((1, 2, 3))
    far = np.abs(np.roll(pooled, 1, 0) - small).mean((1, 2, 3))
    assert (near < 0.5 * far).mean() > 0.9


def test_captions_name_what_the_labels_say():
    data = scenes.load_scenes("train", 300)
    for label, background, captions in zip(data.labels, data.groups["background"], data.captions, strict=True):
        assert len(captions) == 4
        for caption in captions:
            assert scenes.CLASSES[label] in caption.split()
            assert caption.split()[0] == ("an" if caption.split()[1][0] in "aeiou" else "a")
        assert captions[0].endswith(background) and captions[2].endswith(background)
    assert set(np.bincount(data.labels, minlength=10) > 10) == {True}
    assert all("{}" in p for p in data.prompts)


def test_training_has_the_spurious_correlation_and_its_test_breaks_it():
    train, test = scenes.load_scenes("train", 4000), scenes.load_scenes("spurious-test")
    names = np.array(scenes.CLASSES)
    usual = np.array([scenes.USUAL_BACKGROUND.get(c, "") for c in scenes.CLASSES])
    for name, background in scenes.USUAL_BACKGROUND.items():
        own = train.groups["background"][names[train.labels] == name]
        expected = scenes.USUAL_SHARE + (1 - scenes.USUAL_SHARE) / len(scenes.BACKGROUNDS)
        assert np.mean(own == background) == pytest.approx(expected, abs=0.05)
    free = train.groups["background"][usual[train.labels] == ""]
    assert max(np.mean(free == b) for b in scenes.BACKGROUNDS) < 0.2
    aligned = test.groups["group"] == "aligned"
    assert aligned.sum() == 500 and set(names[test.labels]) == set(scenes.USUAL_BACKGROUND)
    np.testing.assert_array_equal(test.groups["background"][aligned], usual[test.labels[aligned]])
    conflict = test.groups["background"][~aligned]
    assert (conflict != usual[test.labels[~aligned]]).all() and set(conflict) <= set(usual)


def test_ood_splits_have_no_labels_and_no_known_shape():
    for split in ("near-ood", "far-ood"):
        data = scenes.load_scenes(split)
        assert data.labels is None and data.classes is None and len(data) == 1000
        with pytest.raises(DataError, match="no labels"):
            data.labelled()
    assert not set(scenes.UNSEEN) & set(scenes.CLASSES)
    assert set(scenes.load_scenes("far-ood").groups["family"]) == set(scenes.FAR_FAMILIES)
    assert set(scenes.load_scenes("style-shift").groups["style"]) == set(scenes.STYLES)


@pytest.mark.parametrize("name", [*drawing.SHAPES, *drawing.UNSEEN_SHAPES])
def test_shapes_are_signed_distances_of_like_size(name):
    x, y = (np.repeat(a, 1, 0) for a in drawing.grid(256))
    x, y = 1.3 * x[0], 1.3 * y[0]
    distance = {**drawing.SHAPES, **drawing.UNSEEN_SHAPES}[name](x, y)
    inside = distance < 0
    assert 0.12 < inside.mean() * 2.6**2 / np.pi < 0.95  # area against a unit circle
    assert np.hypot(x, y)[inside].max() < 1.25
    slope = np.hypot(*np.gradient(distance, 2.6 / 256))
    edge = np.abs(distance) < 0.03
    assert 0.5 < np.median(slope[edge]) < 2.2  # a distance grows by about 1 for each unit of length


def test_hashed_numbers_are_uniform_and_independent():
    dice = drawing.Dice(drawing.image_keys(0, "test", np.arange(20_000)))
    a, b = dice.uniform("a"), dice.uniform("b")
    assert a.min() >= 0 and a.max() < 1 and a.mean() == pytest.approx(0.5, abs=0.01)
    assert np.histogram(a, 20, (0, 1))[0].min() > 850
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03
    shifted = drawing.Dice(drawing.image_keys(1, "test", np.arange(20_000))).uniform("a")
    assert abs(np.corrcoef(a, shifted)[0, 1]) < 0.03


def test_load_reads_options_and_the_digest_follows_the_content():
    data = load("scenes:test?samples=50&seed=3")
    assert len(data) == 50 and data.name == "scenes-test" and data.spec == "scenes:test?samples=50&seed=3"
    assert data.image(2).size == (32, 32) and data.image(2).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(data.image(2)), scenes.draw("test", [2], seed=3)[0])
    assert load("scenes:test?samples=50&side=48").image(0).size == (48, 48)
    digests = {load(f"scenes:{s}").digest for s in ("test", "test?seed=1", "test?side=33", "test?samples=9", "dev")}
    assert len(digests) == 5
    assert load("scenes:?split=dev&samples=5").name == "scenes-dev"


def test_refusals():
    with pytest.raises(DataError, match="no split 'tset'; did you mean 'test'"):
        load("scenes:tset")
    with pytest.raises(DataError, match="side between 8 and 1024"):
        load("scenes:test?side=100000")
    with pytest.raises(DataError, match="at most 1000000"):
        load("scenes:test?samples=1000001")
    with pytest.raises(DataError, match="indices start at 0"):
        scenes.draw("test", [-1])
    with pytest.raises(DataError, match="split is given twice"):
        load("scenes:test?split=dev")
