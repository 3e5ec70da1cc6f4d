"""Scores that learn from training images, through `evaluate`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from qclip.errors import InputError
from qclip.metrics import auroc
from qclip.reliability import evaluate
from qclip.reliability.sample import Known, Sample
from qclip.reliability.scores import SCORES
from qclip.results import Results
from tests.reliability.fakes import Tiny, pictures
from tests.reliability.test_engine import TEMPLATES, fake_encoders, logits  # noqa: F401

STRANGE = pictures("noise", 40, seed=3, strange=True)


def run(models=None, **options) -> Results:  # noqa: ANN001
    models = {"float": Tiny(), "worse": Tiny(1.0)} if models is None else models
    return evaluate(models, pictures(), **{"templates": TEMPLATES, "cache": False, "ood": STRANGE} | options)


def seen(model: Tiny, data) -> Sample:  # noqa: ANN001
    """What a score sees, by hand: with the fake's scale of 20."""
    from qclip import data as qdata
    from tests.reliability.fakes import preprocess

    pixels = next(batch for _, batch in qdata.batches(data, preprocess, size=len(data)))
    features = model.image(pixels.flatten(1)).detach().double().numpy()
    return Sample(
        features / np.linalg.norm(features, axis=1, keepdims=True), logits(model, data) / 20, 20.0, data.labels
    )


def test_each_model_learns_from_its_own_embeddings_and_from_those_of_the_reference() -> None:
    models, train = {"float": Tiny(), "worse": Tiny(1.0)}, pictures("train", 120, seed=8)
    names = ["mahalanobis", "relative_mahalanobis", "knn", "vim", "mcm"]
    results = run(models, train=train, scores=names)
    for name in names:
        fitted = {
            label: SCORES.made(name).fit(Known(np.empty((6, 16)), 20.0, seen(model, train)))
            for label, model in models.items()
        }
        for label, model in models.items():
            inner, outer = seen(model, pictures()), seen(model, STRANGE)
            where = {"model": label, "set": "noise", "score": name, "metric": "auroc"}
            own, borrowed = fitted[label], fitted["float"]
            assert results.value(**where) == pytest.approx(auroc(own(inner), own(outer)), abs=2e-3)
            row = results.row(**where, axis="fitted_on", at="float")
            if name == "mcm":
                assert row is None
            else:
                assert row["value"] == pytest.approx(auroc(borrowed(inner), borrowed(outer)), abs=2e-3)
                assert row["low"] <= row["value"] <= row["high"]
    gap = results.row(
        model="worse", set="noise", score="vim", metric="auroc", axis="fitted_on", at="float", reference="float"
    )
    assert gap["value"] < 0 and gap["low"] is not None


def test_without_training_images_they_are_left_out_by_name() -> None:
    results = run()
    scores = {row["score"] for row in results.where(metric="auroc").rows}
    assert scores == {"mcm", "msp", "maxlogit", "energy", "entropy", "gen"}  # the fake's patches have no embeddings
    notes = "\n".join(results.notes)
    assert "knn, vim (each learns from training images" in notes
    for name in ("knn", "mahalanobis"):
        with pytest.raises(InputError, match=f"score '{name}' learns from training images; name a set .train="):
            run(scores=[name])


def test_training_images_without_labels_teach_the_scores_that_need_none() -> None:
    bare = dataclasses.replace(pictures("train", 120, seed=8), labels=None, classes=None)
    results = run(train=bare)
    scores = {row["score"] for row in results.where(metric="auroc").rows}
    assert {"knn", "vim"} < scores and not {"mahalanobis", "relative_mahalanobis"} & scores
    assert any("mahalanobis, relative_mahalanobis (each learns from the labels" in note for note in results.notes)
    with pytest.raises(InputError, match="score 'mahalanobis' learns from the labels of training images"):
        run(train=bare, scores=["mahalanobis"])


def test_too_few_training_images_leave_a_score_out_or_refuse_it_where_it_was_named() -> None:
    few = pictures("train", 30, seed=8)
    results = run(train=few)
    assert "knn" not in {row["score"] for row in results.rows}
    assert results.value(model="worse", score="vim", metric="auroc", axis="") is not None
    assert any(
        "score 'knn' needs 50 training images or more, and 30 were given; it is left out" in n for n in results.notes
    )
    with pytest.raises(InputError, match="score 'knn' needs 50 training images or more, and 30 were given"):
        run(train=few, scores=["knn"])


def test_choices_that_the_data_made_are_said() -> None:
    results = run(train=pictures("train", 60, seed=8), scores=["vim"])
    said = [note for note in results.notes if "16 dimensions, 8 are principal" in note]
    assert sorted(note.partition(":")[0] for note in said) == ["float", "worse"]


def test_words_that_are_no_class_are_read_from_a_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[list[str]] = []

    def tokenizer(prompts: list[str]) -> torch.Tensor:  # the fake knows its classes only
        embedded.append(prompts)
        return torch.tensor([[len(p) % 6, len(p)] for p in prompts])

    def encoders(model: Tiny):  # noqa: ANN202
        out = Tiny.encoders(model)
        out.tokenizer = tokenizer
        return out

    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", encoders)
    file = tmp_path / "words.txt"
    file.write_text("\n".join(["Cat", *("w" * k for k in range(1, 60)), "w", ""]))
    results = run(negatives=file, scores=["neglabel"])
    assert 0 <= results.value(model="worse", score="neglabel", metric="auroc", reference="") <= 1
    assert any("float: score 'neglabel': 8 words that are no class, in 8 groups" in note for note in results.notes)
    assert not any("Cat" in prompt for prompts in embedded for prompt in prompts)
    again = run(negatives=["w" * k for k in range(1, 60)], scores=["neglabel"])
    assert again.where(metric="auroc").rows == results.where(metric="auroc").rows
    with pytest.raises(InputError, match="names no word that is not a class"):
        run(negatives=["CAT", "dog"])
    with pytest.raises(InputError, match=r"name a file of them \(negatives=\)"):
        run(scores=["neglabel"])


def test_models_of_other_widths_borrow_nothing() -> None:
    results = run({"float": Tiny(), "wide": Tiny(width=24)}, train=pictures("train", 120, seed=8), scores=["knn"])
    assert results.value(model="wide", score="knn", metric="auroc", reference="") is not None
    assert not [row for row in results.rows if row["axis"] == "fitted_on"]


def test_an_ood_set_that_is_the_id_set_is_said() -> None:
    twin = dataclasses.replace(pictures(), name="twin")
    results = run(ood=twin, scores=["mcm"])
    assert results.value(model="float", set="twin", metric="auroc") == pytest.approx(0.5)
    assert any("twin: its images are those of the ID set" in note for note in results.notes)


def test_a_set_of_several_roles_is_read_in_each() -> None:
    both, train = pictures(), pictures("train", 120, seed=8)
    found = evaluate({"float": Tiny()}, both, train=both, dev=both, ood=STRANGE, templates=TEMPLATES, cache=False)
    assert found.value(metric="top1", role="id") is not None and found.value(metric="ece_ts", role="id") is not None
    assert found.value(metric="auroc", score="mahalanobis", axis="") is not None
    assert any("has another role, too" in note for note in found.notes)
    apart = evaluate({"float": Tiny()}, both, train=train, dev=train, ood=STRANGE, templates=TEMPLATES, cache=False)
    alone = evaluate({"float": Tiny()}, both, train=train, ood=STRANGE, templates=TEMPLATES, cache=False)
    wanted = {"metric": "auroc", "score": "vim", "axis": ""}
    assert apart.value(**wanted) == alone.value(**wanted) is not None


def test_scores_that_are_left_out_are_named_where_scores_are_asked_for() -> None:
    found = [run(ood=ood, measurements=["clean", "ood"]) for ood in (STRANGE, ())]
    assert [any("scores left out" in note for note in each.notes) for each in found] == [True, False]
