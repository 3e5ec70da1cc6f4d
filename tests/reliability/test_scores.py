from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance, LedoitWolf
from sklearn.neighbors import NearestNeighbors

from qclip.reliability.sample import Known, Sample
from qclip.reliability.scores import SCORES, UnfitError
from qclip.reliability.scores.mahalanobis import ledoit_wolf
from qclip.reliability.scores.vim import principal_dimensions

WIDTH, CLASSES, SCALE = 12, 5, 30.0


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


RNG = np.random.default_rng(3)
WORDS = unit(RNG.normal(size=(CLASSES, WIDTH)))


def sample(n: int, seed: int, spread: float = 0.2) -> Sample:
    """Images around the class embeddings, in a cone, as CLIP's lie."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    features = unit(WORDS[labels] + spread * rng.normal(size=(n, WIDTH)) * np.linspace(0.2, 2, WIDTH) + 0.1)
    return Sample(features, features @ WORDS.T, SCALE, labels)


TRAIN, IMAGES = sample(300, 0), sample(70, 1)
KNOWN = Known(WORDS, SCALE, TRAIN)
LEARN = [name for name in SCORES if SCORES.made(name).needs <= {"train", "labels"}]


def score(name: str, of: Sample = IMAGES, known: Known = KNOWN) -> np.ndarray:
    return SCORES.made(name).fit(known)(of)


def test_scores_that_learn_nothing_are_their_formulas() -> None:
    cosines, z = IMAGES.cosines.astype(np.longdouble), SCALE * IMAGES.cosines.astype(np.longdouble)
    bare = np.exp(cosines) / np.exp(cosines).sum(1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    rest = np.stack([np.delete(p, k, axis=1).sum(1) for k in range(CLASSES)], axis=1)  # 1 - p to the last digit
    expected = {
        "mcm": bare.max(1),
        "msp": p.max(1),
        "maxlogit": cosines.max(1),
        "energy": np.log(np.exp(z).sum(1)),
        "entropy": (p * np.log(p)).sum(1),
        "gen": -((p * rest) ** 0.1).sum(1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(score(name), values.astype(float), rtol=1e-12, atol=1e-14, err_msg=name)


def test_gen_sums_the_hundred_largest_probabilities() -> None:
    cosines = np.random.default_rng(0).uniform(-0.2, 0.4, (9, 250))
    p = np.exp(SCALE * cosines) / np.exp(SCALE * cosines).sum(1, keepdims=True)
    largest = -np.sort(-p, axis=1)[:, :100]
    found = score("gen", Sample(cosines, cosines, SCALE))
    np.testing.assert_allclose(found, -((largest * (1 - largest)) ** 0.1).sum(1), rtol=1e-12)


@pytest.mark.parametrize("name", ["mcm", "msp", "maxlogit", "energy", "entropy", "gen"])
def test_no_scale_overflows(name: str) -> None:
    assert np.isfinite(score(name, dataclasses.replace(IMAGES, scale=1e5))).all()


def test_certainty_is_the_best_that_softmax_scores_give() -> None:
    """Where one probability is 1 and the others underflow to 0, 0 log 0 is 0."""
    cosines = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    for name, values in {"msp": [1, 1 / 2, 1 / 3], "entropy": [0, -np.log(2), -np.log(3)]}.items():
        np.testing.assert_allclose(score(name, Sample(cosines, cosines, 1e4)), values, atol=1e-12)
    sure, torn, lost = score("gen", Sample(cosines, cosines, 1e4))
    assert sure == 0 > torn > lost


def by_hand(train: Sample, images: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Mahalanobis distances to every class and to everything, one image and one class at a time, by scikit-learn."""
    means = np.array([train.features[train.labels == k].mean(0) for k in range(CLASSES)])
    within = EmpiricalCovariance(assume_centered=True).fit(train.features - means[train.labels]).covariance_
    total = EmpiricalCovariance().fit(train.features).covariance_
    inner, outer = (np.linalg.inv(c + 1e-6 * np.trace(c) / WIDTH * np.eye(WIDTH)) for c in (within, total))
    middle = train.features.mean(0)
    to_classes = np.array([[(f - m) @ inner @ (f - m) for m in means] for f in images.features])
    return to_classes, np.array([(f - middle) @ outer @ (f - middle) for f in images.features])


def test_mahalanobis_is_its_formula() -> None:
    to_classes, to_all = by_hand(TRAIN, IMAGES)
    np.testing.assert_allclose(score("mahalanobis"), -to_classes.min(1), rtol=1e-9)
    np.testing.assert_allclose(score("relative_mahalanobis"), (to_all[:, None] - to_classes).max(1), rtol=1e-8)


def test_a_class_without_training_images_attracts_nothing() -> None:
    there = TRAIN.labels != 2
    some = Sample(TRAIN.features[there], TRAIN.cosines[there], SCALE, TRAIN.labels[there])
    found = score("mahalanobis", known=Known(WORDS, SCALE, some))
    means = {k: some.features[some.labels == k].mean(0) for k in (0, 1, 3, 4)}
    residuals = np.array([f - means[k] for f, k in zip(some.features, some.labels, strict=True)])
    c = residuals.T @ residuals / len(residuals)
    inverse = np.linalg.inv(c + 1e-6 * np.trace(c) / WIDTH * np.eye(WIDTH))
    expected = [-min((f - m) @ inverse @ (f - m) for m in means.values()) for f in IMAGES.features]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_few_images_shrink_the_covariance_and_say_so() -> None:
    few = sample(9, 4)
    deviations = few.features - few.features.mean(0)
    expected = LedoitWolf(assume_centered=True).fit(deviations).covariance_
    np.testing.assert_allclose(ledoit_wolf(deviations), expected, rtol=1e-10, atol=1e-15)
    fitted = SCORES.made("mahalanobis").fit(Known(WORDS, SCALE, few))
    assert "Ledoit-Wolf" in fitted.remark and np.isfinite(fitted(IMAGES)).all()
    assert not SCORES.made("mahalanobis").fit(KNOWN).remark


def test_knn_is_the_distance_to_the_50th_neighbour() -> None:
    distances, _ = NearestNeighbors(n_neighbors=50, algorithm="brute").fit(TRAIN.features).kneighbors(IMAGES.features)
    np.testing.assert_allclose(score("knn"), -distances[:, -1], rtol=1e-7)


def test_vim_is_its_formula() -> None:
    """As the paper's code does it, with an origin of 0."""
    dimensions = WIDTH // 2
    covariance = EmpiricalCovariance(assume_centered=True).fit(TRAIN.features).covariance_
    values, vectors = np.linalg.eig(covariance)
    outside = vectors[:, np.argsort(values)[::-1][dimensions:]]
    alpha = TRAIN.logits.max(1).mean() / np.linalg.norm(TRAIN.features @ outside, axis=1).mean()
    energy = np.log(np.exp(IMAGES.logits).sum(1))
    expected = energy - alpha * np.linalg.norm(IMAGES.features @ outside, axis=1)
    np.testing.assert_allclose(score("vim"), expected, rtol=1e-9)
    assert "12 dimensions, 6 are principal" in SCORES.made("vim").fit(KNOWN).remark
    assert [principal_dimensions(d) for d in (128, 512, 513, 768, 1501, 2048)] == [64, 256, 512, 512, 1000, 1000]


def test_neglabel_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """70 words per group would be 100 groups of one here: 1,400 words, 210 of them chosen, 2 in each of 100 groups."""
    negatives = unit(np.random.default_rng(5).normal(size=(1400, WIDTH)))
    likeness = np.array([np.quantile([w @ c for c in WORDS], 0.95) for w in negatives])
    chosen = negatives[np.argsort(likeness)[:210]]
    order = np.random.RandomState(0).permutation(210)[:200].reshape(100, 2)
    fitted = SCORES.made("neglabel").fit(Known(WORDS, SCALE, negatives=negatives))
    found = fitted(IMAGES)
    for i, f in enumerate(IMAGES.features):
        inside = sum(np.exp(100 * (f @ c)) for c in WORDS)
        shares = [inside / (inside + sum(np.exp(100 * (f @ chosen[k])) for k in group)) for group in order]
        assert found[i] == pytest.approx(np.mean(shares), rel=1e-11)
    assert fitted.remark == "200 words that are no class, in 100 groups"
    monkeypatch.setattr("qclip.reliability.scores.neglabel.BLOCK", 1000)
    again = SCORES.made("neglabel").fit(Known(WORDS, SCALE, negatives=negatives))
    np.testing.assert_allclose(again(IMAGES), found, rtol=1e-12)


def test_few_words_are_a_group_each_and_fewer_are_refused() -> None:
    negatives = unit(np.random.default_rng(5).normal(size=(20, WIDTH)))
    assert SCORES.made("neglabel").fit(Known(WORDS, SCALE, negatives=negatives)).words.shape == (3, 1, WIDTH)
    with pytest.raises(UnfitError, match="of 6 that is none"):
        SCORES.made("neglabel").fit(Known(WORDS, SCALE, negatives=negatives[:6]))


@pytest.mark.parametrize("name", LEARN)
def test_an_image_is_scored_alike_in_any_company(name: str) -> None:
    fitted, whole = SCORES.made(name).fit(KNOWN), score(name)
    parts = [
        fitted(Sample(IMAGES.features[i : i + 7], IMAGES.cosines[i : i + 7], SCALE, IMAGES.labels[i : i + 7]))
        for i in range(0, len(IMAGES), 7)
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-9, atol=1e-12)
    assert whole.dtype == np.float64 and whole.shape == (len(IMAGES),)


@pytest.mark.parametrize("name", LEARN)
def test_images_of_the_classes_score_higher_than_noise(name: str) -> None:
    noise = unit(np.random.default_rng(9).normal(size=(70, WIDTH)))
    strange = Sample(noise, noise @ WORDS.T, SCALE)
    higher = (score(name)[:, None] > score(name, strange)).mean()
    assert higher > 0.8


@pytest.mark.parametrize(
    "name, train, why",
    [
        ("knn", sample(49, 0), "50 training images or more, and 49 were given"),
        ("mahalanobis", Sample(WORDS, WORDS @ WORDS.T, SCALE, np.arange(CLASSES)), "differ within their classes"),
        ("vim", Sample(WORDS, WORDS @ WORDS.T, SCALE), "span more than 6 dimensions"),
    ],
)
def test_a_training_set_that_teaches_nothing_is_refused(name: str, train: Sample, why: str) -> None:
    with pytest.raises(UnfitError, match=why):
        SCORES.made(name).fit(Known(WORDS, SCALE, train))
