"""Rows of corruptions: means over severities and over groups, and the error over that of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from qclip.data.corruptions import CORRUPTIONS
from qclip.errors import DataError, InputError
from qclip.reliability import evaluate
from qclip.reporting import html
from tests.reliability.fakes import Tiny, pictures

NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")


@pytest.fixture(autouse=True)
def fake_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", Tiny.encoders)
    monkeypatch.setattr("qclip.reliability.engine.REPLICATES", 50)


def run(corruptions, n: int = 90, **options):
    models = {"float": Tiny(), "worse": Tiny(1.0)}
    options = {
        "templates": ["a {}"],
        "cache": False,
        "corruptions": corruptions,
        "measurements": ["corrupted"],
    } | options
    return evaluate(models, pictures(n=n), **options)


def test_a_group_has_the_means_of_its_corruptions_and_the_error_ratio() -> None:
    results = run(["noise"])
    for model in ("float", "worse"):
        for metric in ("mean_top1", "mean_ece", "mean_nll"):
            own = [results.value(model=model, metric=metric, corruption=name) for name in NOISES]
            row = results.row(model=model, metric=metric, corruption="noise")
            assert row["value"] == pytest.approx(np.mean(own)) and row["low"] <= row["value"] <= row["high"]
            assert row["role"] == "corrupted" and row["n"] == 90
    difference = results.row(model="worse", reference="float", metric="mean_top1", corruption="noise")
    assert difference["value"] == pytest.approx(
        results.value(model="worse", metric="mean_top1", corruption="noise")
        - results.value(model="float", metric="mean_top1", corruption="noise")
    )
    assert difference["high"] - difference["low"] > 0
    for corruption in (*NOISES, "noise"):
        errors = [1 - results.value(model=m, metric="mean_top1", corruption=corruption) for m in ("worse", "float")]
        ratio = results.row(model="worse", reference="float", metric="error_ratio", corruption=corruption)
        assert ratio["value"] == pytest.approx(errors[0] / errors[1]) and ratio["low"] < ratio["value"] < ratio["high"]
    assert results.unique("corruption") == [*NOISES, "noise"]  # not of groups that were evaluated in part
    page = html(results)
    for said in ("Noise robustness", "Gaussian noise robustness", "Impulse noise on pets", "Noise on pets"):
        assert said in page, said


def test_a_group_in_part_has_no_mean_and_no_error_has_no_ratio() -> None:
    results = run(["gaussian_noise", "shot_noise"])
    assert results.unique("corruption") == ["gaussian_noise", "shot_noise"]

    def clean(image, severity, small, rng):
        return image

    clean.name, clean.label, clean.version, clean.group = "calm", "Calm", 1, "noise"
    CORRUPTIONS.register(clean)
    try:
        easy = evaluate(
            {"float": Tiny(), "same": Tiny()},
            pictures(n=6),  # of one picture for each class, all of them right
            templates=["a {}"],
            cache=False,
            corruptions=["calm"],
            measurements=["corrupted"],
        )
        ratio = easy.row(model="same", reference="float", metric="error_ratio", corruption="calm")
        error = 1 - easy.value(model="float", metric="mean_top1", corruption="calm")
        assert (ratio["value"] is None) == (error == 0) and ratio["value"] in (None, 1.0)
        group = run(["noise"])
        assert "calm" in group.unique("corruption")  # one of another package runs with its group ...
        own = [group.value(model="float", metric="mean_top1", corruption=name) for name in NOISES]
        found = group.value(model="float", metric="mean_top1", corruption="noise")
        assert found == pytest.approx(np.mean(own))  # ... and is in no mean of ours
    finally:
        CORRUPTIONS.unregister("calm")


def test_means_are_over_the_severities_that_were_asked_for() -> None:
    every, some = run(["gaussian_noise"]), run(["gaussian_noise"], severities=[4, 2])
    assert [row["severity"] for row in some.where(metric="top1", model="worse", reference="")] == [0, 2, 4]
    for metric in ("top1", "ece", "nll"):
        own = {"model": "worse", "metric": metric, "corruption": "gaussian_noise"}
        values = [every.value(severity=severity, **own) for severity in (2, 4)]
        found = some.row(model="worse", metric=f"mean_{metric}", corruption="gaussian_noise")
        assert found is not None and found["value"] == pytest.approx(np.mean(values))
    assert any("are over 2, 4 alone" in note for note in some.notes)
    assert not any("alone" in note for note in every.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"severities": [0]}, "1 to 5"), ({"severities": []}, "no severity"), ({"replicates": 0}, "1 or more")],
)
def test_severities_and_replicates_that_cannot_be_are_refused(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(["gaussian_noise"], **options)


def test_replicates_are_those_that_were_asked_for() -> None:
    results = run(["gaussian_noise"], severities=[1], replicates=7)
    assert results.meta["replicates"] == 7


def test_unknown_names_are_refused_before_anything_is_read() -> None:
    with pytest.raises(DataError, match="unknown corruption 'wether'; did you mean 'weather'"):
        run(["noise", "wether"])
    with pytest.raises(DataError, match="defocus_blur needs 16 x 16 pixels or more, not 8 x 8"):
        run(["defocus_blur"])
