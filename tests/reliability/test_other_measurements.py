"""Retrieval, human labels, the sigmoid of pairs and the linear probe, through `evaluate`, against the same by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.linear_model import LogisticRegression

from qclip import metrics
from qclip.errors import InputError
from qclip.reliability import evaluate
from qclip.reliability.measurements import probe
from qclip.results import Results
from tests.reliability.fakes import CLASSES, Tiny, pictures
from tests.reliability.test_engine import TEMPLATES, fake_encoders, logits  # noqa: F401
from tests.reliability.test_learned_scores import seen


def run(models=None, data=None, **options) -> Results:  # noqa: ANN001
    models = {"float": Tiny(), "worse": Tiny(1.0)} if models is None else models
    return evaluate(models, pictures() if data is None else data, **{"templates": TEMPLATES, "cache": False} | options)


# ---- retrieval -------------------------------------------------------------------------------------------------------


def captioned(n: int = 30, bare: tuple[int, ...] = ()):  # noqa: ANN201
    data = pictures("album", n, seed=4)
    captions = [[f"{CLASSES[k]} {'x' * (3 * i + j)}" for j in range(1 + i % 3)] for i, k in enumerate(data.labels)]
    captions = [[] if i in bare else each for i, each in enumerate(captions)]
    return dataclasses.replace(data, labels=None, classes=None, captions=captions)


def text(model: Tiny, captions: list[str]) -> np.ndarray:
    from tests.reliability.fakes import tokenizer

    found = model.encode_text(tokenizer(captions)).double().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("bare", [(), (0, 7)])
def test_recall_is_that_of_the_whole_matrix_sorted(bare: tuple[int, ...]) -> None:
    models, data = {"float": Tiny(), "worse": Tiny(1.0)}, captioned(bare=bare)
    models["worse"].words = models["worse"].words.roll(1, 0)  # its texts are its own, too
    results = run(models, captions=data, measurements=["retrieval"])
    whose = [i for i, captions in enumerate(data.captions) for _ in captions]
    for label, model in models.items():
        labelled = dataclasses.replace(data, labels=np.zeros(len(data), np.int64))
        similar = seen(model, labelled).features @ text(model, [c for each in data.captions for c in each]).T
        for k in (1, 5, 10):
            first = np.argsort(-similar, axis=1, kind="stable")[:, :k]
            found = [any(whose[c] == i for c in first[i]) for i in range(len(data)) if data.captions[i]]
            row = results.row(model=label, metric="image_to_text_recall", axis="k", at=k)
            assert row["value"] == pytest.approx(np.mean(found)) and row["role"] == "captions" and row["n"] == 30
            first = np.argsort(-similar.T, axis=1, kind="stable")[:, :k]
            found = [whose[c] in first[c] for c in range(len(whose))]
            row = results.row(model=label, metric="text_to_image_recall", axis="k", at=k)
            assert row["value"] == pytest.approx(np.mean(found)) and row["low"] <= row["value"] <= row["high"]
    gap = results.row(model="worse", metric="text_to_image_recall", axis="k", at=5, reference="float")
    assert gap["low"] <= gap["value"] <= gap["high"]
    said = f"album: retrieval among 30 images and {len(whose)} captions ({0 if bare else 1} to 3 per image)"
    assert said in results.notes
    assert ("album: 2 images have no caption: they are found, and find nothing" in results.notes) == bool(bare)


def test_captions_of_images_that_cannot_be_read_are_in_no_gallery() -> None:
    data = captioned(13)
    data.source.bad = {0, 5, 6}
    readable = np.array([i for i in range(13) if i not in data.source.bad])
    found, alone = (run(captions=each, measurements=["retrieval"]) for each in (data, data.select(readable)))
    for metric in ("image_to_text_recall", "text_to_image_recall"):
        for k in (1, 5, 10):
            values = [r.value(model="worse", metric=metric, axis="k", at=k) for r in (found, alone)]
            assert values[0] == values[1] is not None
    data.source.bad = {0, 1, 5, 6}  # nine are left: too few for the tenth place
    found = run(captions=data, measurements=["retrieval"])
    row = found.row(model="worse", metric="image_to_text_recall", axis="k", at=10)
    assert row["value"] is None and row["n"] == 9
    assert found.value(model="worse", metric="image_to_text_recall", axis="k", at=5) is not None


def test_a_set_whose_readable_images_have_no_caption_is_named_and_ends_nothing() -> None:
    data = captioned(12, bare=tuple(range(1, 12)))
    data.source.bad = {0}
    found = run(captions=data, measurements=["retrieval", "clean"])
    assert not found.where(metric="image_to_text_recall").rows and found.where(metric="top1").rows
    assert any("album: none of its 11 images that can be read has a caption" in note for note in found.notes)


def test_sets_that_retrieve_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="album has 9 images: recall at 10 needs 10 or more"):
        run(captions=captioned(9))
    with pytest.raises(InputError, match="memory:pets has no captions"):
        run(captions=pictures())


# ---- human labels ----------------------------------------------------------------------------------------------------


def judged(unjudged: int = 0):  # noqa: ANN201
    data = pictures()
    counts = np.random.default_rng(0).multinomial(20, np.full(6, 1 / 6), 90) + 30 * np.eye(6, dtype=int)[data.labels]
    counts[:unjudged] = 0
    return dataclasses.replace(data, counts=counts)


@pytest.mark.parametrize("unjudged", [0, 25])
def test_human_labels_are_compared_on_images_that_were_judged(unjudged: int) -> None:
    models, data = {"float": Tiny(), "worse": Tiny(1.0)}, judged(unjudged)
    results = run(models, data, measurements=["human"])
    shares = data.counts[unjudged:] / data.counts[unjudged:].sum(1, keepdims=True)
    theirs = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(1)
    for label, model in models.items():
        p = metrics.softmax(logits(model, data))[unjudged:]
        row = results.row(model=label, set="pets", metric="human_nll")
        assert (
            row["value"] == pytest.approx(-(shares * np.log(p)).sum(1).mean(), rel=1e-5) and row["n"] == 90 - unjudged
        )
        expected = pearsonr(-(p * np.log(p)).sum(1), theirs)[0]
        assert results.value(model=label, set="pets", metric="entropy_correlation") == pytest.approx(expected, abs=1e-4)
    assert results.row(model="worse", metric="human_nll", reference="float")["low"] is not None
    assert any(f"pets: {90 - unjudged} images were judged by 50 to 50 people" in note for note in results.notes)
    assert not run(measurements=["human"]).where(metric="human_nll").rows


def test_an_image_counts_the_same_whether_few_or_many_judged_it() -> None:
    data = judged()
    more = dataclasses.replace(data, counts=data.counts * np.where(np.arange(90) % 2, 3, 1)[:, None])
    few, many = (run({"float": Tiny()}, each, measurements=["human"]) for each in (data, more))
    for metric in ("human_nll", "entropy_correlation"):
        assert many.value(metric=metric) == pytest.approx(few.value(metric=metric))
    assert any("judged by 50 to 150 people" in note for note in many.notes)


def test_counts_of_a_shift_set_are_put_in_the_order_of_the_classes() -> None:
    data = judged()
    order = [3, 0, 5, 1, 2, 4]
    turned = dataclasses.replace(
        data,
        name="turned",
        classes=[CLASSES[k] for k in order],
        labels=np.argsort(order)[data.labels],
        counts=data.counts[:, order],
    )
    results = run({"float": Tiny()}, data, shift=turned, measurements=["human"])
    assert results.value(set="turned", metric="human_nll") == results.value(set="pets", metric="human_nll")


def test_nothing_is_said_where_nobody_judged_or_all_agreed() -> None:
    results = run({"float": Tiny()}, judged(90), measurements=["human"])
    assert any("nobody judged any of its images" in note for note in results.notes)
    agreed = dataclasses.replace(pictures(), counts=np.eye(6, dtype=int)[pictures().labels])
    results = run({"float": Tiny()}, agreed, measurements=["human"])
    assert results.value(metric="entropy_correlation") is None and results.value(metric="human_nll") is not None
    assert any("entropies is undefined" in note for note in results.notes)


# ---- SigLIP ----------------------------------------------------------------------------------------------------------


def test_models_with_a_bias_have_their_sigmoid_judged() -> None:
    models = {"float": Tiny(bias=-10.0), "worse": Tiny(1.0, bias=-8.0), "clip": Tiny()}
    results = run(models, measurements=["pairwise"])
    for label, bias in (("float", -10.0), ("worse", -8.0)):
        z, match = logits(models[label], pictures()) + bias, np.eye(6, dtype=bool)[pictures().labels]
        p = 1 / (1 + np.exp(-z))
        nll = -np.where(match, np.log(p), np.log1p(-p)).mean()
        assert results.value(model=label, metric="pair_nll", reference="") == pytest.approx(nll, rel=1e-4)
        ece = metrics.bins.bin_of(p.ravel())
        gaps = [abs((match.ravel() - p.ravel())[ece == b].sum()) for b in range(15)]
        row = results.row(model=label, metric="pair_ece")
        assert row["value"] == pytest.approx(sum(gaps) / p.size, abs=2e-3) and row["low"] < row["high"]
    for metric in ("pair_ece", "pair_nll"):
        row = results.row(model="worse", metric=metric, reference="float")
        ours, theirs = (results.value(model=m, metric=metric, reference="") for m in ("float", "worse"))
        assert row["value"] == pytest.approx(theirs - ours) and row["value"] != 0 and row["low"] < row["high"]
    assert not results.where(model="clip", metric="pair_nll").rows
    assert not run(measurements=["pairwise"]).where(metric="pair_nll").rows


# ---- linear probe ----------------------------------------------------------------------------------------------------


def test_the_probe_learns_from_each_models_own_embeddings() -> None:
    models, train = {"float": Tiny(), "worse": Tiny(1.0)}, pictures("train", 120, seed=8)
    shifted = pictures("later", 60, seed=11)
    results = run(models, train=train, shift=shifted, measurements=["probe"])
    for label, model in models.items():
        learned = seen(model, train)
        c = results.value(model=label, set="train", metric="probe_c")
        assert 1e-8 < c < 1e8
        fitted = LogisticRegression(C=c, max_iter=1000).fit(learned.features, learned.labels)
        for data in (pictures(), shifted):
            image = seen(model, data)
            right = fitted.predict(image.features) == data.labels
            row = results.row(model=label, set=data.name, metric="probe_top1")
            assert row["value"] == pytest.approx(right.mean(), abs=0.012) and row["low"] <= row["value"] <= row["high"]
    assert results.row(model="worse", set="pets", metric="probe_top1", reference="float")["low"] is not None
    again = run(models, train=train, shift=shifted, measurements=["probe"])
    assert again.rows == results.rows


def test_images_that_cannot_be_read_teach_and_test_no_probe() -> None:
    bad = [1, 2, 9, 40]
    train, data = pictures("train", 120, seed=8, bad=bad), pictures(bad=[0, 7, 8])
    found = run({"float": Tiny()}, data, train=train, measurements=["probe"])
    row = found.row(metric="probe_top1", set="pets")
    assert row["n"] == 87 and found.row(metric="probe_c")["n"] == 116
    good = [each.select([i for i in range(len(each)) if i not in each.source.bad]) for each in (train, data)]
    learned, image = (seen(Tiny(), each) for each in good)
    fitted = LogisticRegression(C=found.value(metric="probe_c"), max_iter=1000).fit(learned.features, learned.labels)
    right = fitted.predict(image.features) == image.labels
    assert row["value"] == pytest.approx(right.mean(), abs=0.012) and right.mean() > 0.5


def test_a_probe_that_was_stopped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ITERATIONS", 1)
    found = run({"float": Tiny()}, train=pictures("train", 120, seed=8), measurements=["probe"])
    assert any(
        note.startswith("float: the linear probe (C = ") and "stopped after 1 it" in note for note in found.notes
    )


def test_c_is_the_best_of_the_held_out_part() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    features = np.eye(4)[labels] + rng.normal(0, 0.8, (200, 4))
    order = rng.permutation(200)
    part, rest = order[:160], order[160:]

    def held_out(c: float) -> float:
        return float(
            (
                LogisticRegression(C=c, max_iter=1000).fit(features[part], labels[part]).predict(features[rest])
                == labels[rest]
            ).mean()
        )

    fitted = probe.fit(features, labels, order)
    assert held_out(fitted.C) >= max(held_out(10.0**e) for e in range(-6, 7, 2))
    np.testing.assert_allclose(
        fitted.coef_, LogisticRegression(C=fitted.C, max_iter=1000).fit(features, labels).coef_, rtol=1e-6
    )


def test_of_equally_good_c_the_smallest_is_taken() -> None:
    fitted = probe.fit(np.tile(np.eye(2), (20, 1)), np.tile([0, 1], 20), np.arange(40))  # any C separates these
    assert fitted.C == pytest.approx(10.0**-6 / 10 / 10**0.5)


def test_c_is_refined_around_the_best_of_the_coarse_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out accuracy is made to peak at 10^2.5, between two of the seven coarse values."""

    class Made:
        def __init__(self, c: float) -> None:
            self.C = c

        def predict(self, features: np.ndarray) -> np.ndarray:
            right = round(len(features) * (1 - abs(np.log10(self.C) - 2.5) / 20))
            return np.arange(len(features)) >= right

    monkeypatch.setattr(probe, "_regression", lambda features, labels, c: Made(c))
    fitted = probe.fit(np.zeros((5000, 2)), np.zeros(5000, int), np.arange(5000))
    assert fitted.C == pytest.approx(10**2.5)


def test_the_probe_uses_a_sample_unless_all_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MOST", 70)
    train = pictures("train", 120, seed=8)
    some = run({"float": Tiny()}, train=train, measurements=["probe"])
    every = run({"float": Tiny()}, train=train, measurements=["probe"], full=True, corruptions=[])
    assert some.row(metric="probe_c")["n"] == 70 and every.row(metric="probe_c")["n"] == 120
    assert some.value(metric="probe_top1", set="pets") > 0.5  # with the labels of these images
    assert any("a fixed sample of 70 of 120 images" in note for note in some.notes)
    one = pictures("ants", 120, seed=8).select(np.arange(0, 120, 6))
    lone = run({"float": Tiny()}, train=one, measurements=["probe"])
    assert any("needs more training images of more classes" in note for note in lone.notes)
    bare = dataclasses.replace(train, labels=None, classes=None)
    assert not run({"float": Tiny()}, train=bare, measurements=["probe"]).where(metric="probe_top1").rows
    assert torch.is_grad_enabled()


def test_what_was_named_and_finds_nothing_to_measure_is_said() -> None:
    found = run(measurements=["clean", "probe", "retrieval"])
    assert "nothing that was given is measured by probe, retrieval" in found.notes
    assert not any("nothing that was given" in note for note in (*run().notes, *run(measurements=["clean"]).notes))


# ---- subsets of the classes ------------------------------------------------------------------------------------------


def test_a_shift_set_is_measured_among_its_own_classes_where_it_says_so() -> None:
    some = pictures("r", 60, seed=9).select(np.flatnonzero(np.isin(np.arange(60) % 6, (1, 2, 4))))
    model = Tiny(1.0)
    z = logits(model, some)
    among_all = run({"m": model}, shift=some, measurements=["clean"])
    assert among_all.value(set="r", metric="top1") == pytest.approx((z.argmax(1) == some.labels).mean())
    assert any("r has images of 3 of the 6 classes and is measured among all" in note for note in among_all.notes)
    own = run({"m": model}, shift=dataclasses.replace(some, own_classes=True), measurements=["clean"])
    expected = np.array([1, 2, 4])[z[:, [1, 2, 4]].argmax(1)] == some.labels
    assert (
        own.value(set="r", metric="top1") == pytest.approx(expected.mean()) != among_all.value(set="r", metric="top1")
    )
    assert not any("measured among all" in note for note in own.notes)
    one = dataclasses.replace(some.select(some.labels == 2), own_classes=True)
    with pytest.raises(InputError, match="has images of 1 class; among=own needs two or more"):
        run({"m": model}, shift=one)


def test_an_id_set_narrows_what_everything_is_compared_with() -> None:
    some = dataclasses.replace(pictures("r", 60, seed=9).select(np.arange(60) % 6 < 4), own_classes=True)
    results = run({"m": Tiny()}, some, ood=pictures("noise", 30, seed=3, strange=True), measurements=["clean", "ood"])
    z = logits(Tiny(), some)[:, :4]
    assert results.value(set="r", metric="top1") == pytest.approx((z.argmax(1) == some.labels).mean())
    with pytest.raises(Exception, match="is not a class of"):
        run({"m": Tiny()}, some, shift=pictures("later", 60, seed=2))
