"""What can be known before a model is loaded is said before, and in the words of the command line."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qclip
from qclip.cli import main
from qclip.errors import InputError, in_command, option
from qclip.reliability import check

SCENES = "scenes:test?samples=12"


@pytest.fixture
def unlabelled(tmp_path: Path) -> str:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return f"folder:{folder}"


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qclip, "load_model", lambda *_, **__: pytest.fail("a model was loaded first"))
    monkeypatch.setattr("qclip.artifact.is_artifact", lambda _: True)


def refused(line: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(line) == 2
    out, err = capsys.readouterr()
    (told,) = [line for line in err.splitlines() if " %  listing" not in line]
    assert out == "" and told.startswith("qclip: ")
    assert not [name for name in ("train", "negatives", "share", "data", "dev", "ood", "texts") if f"{name}=" in err]
    return err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--score", "knn"], "score 'knn' learns from training images; name a set (--train)"),
        (["--score", "neglabel"], "no class; name a file of them (--negatives)"),
        (
            ["--score", "knn", "--train", "scenes:train?samples=12"],
            "needs 50 training images or more, and 12 were given",
        ),
        (["--images", "folder:nowhere"], "nowhere"),
        (["--ood", "far=folder:nowhere"], "nowhere"),
        (["--share", "1/2", "--no-cache"], "--share leaves nothing behind with --no-cache"),
        (["--share", "3/2"], "--share '3/2' is no part"),
    ],
)
def test_an_evaluation(more: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    assert told in refused(["evaluate", "scenes-clean", "--data", SCENES, *more], capsys)


def test_labels_that_an_evaluation_or_controls_need(unlabelled: str, capsys: pytest.CaptureFixture) -> None:
    assert "has no labels" in refused(["evaluate", "scenes-clean", "--data", unlabelled], capsys)
    assert "has no captions" in refused(["evaluate", "scenes-clean", "--captions", unlabelled], capsys)
    line = ["spectrum", "scenes-clean", "--recipe", "w8a8", "--data", unlabelled, "--through"]
    assert "has no labels" in refused(line, capsys)


@pytest.mark.parametrize(
    ("require", "told"),
    [
        ("top1>=-0.5", "needs labelled images"),
        ("index_recall@6>=0.9", "needs 7 images or more"),
        ("text_recall@2>=0.9", "needs texts to search by; give some (--texts)"),
    ],
)
def test_requirements_on_unlabelled_images(
    require: str, told: str, unlabelled: str, capsys: pytest.CaptureFixture
) -> None:
    line = ["verify", "artifact", "--against", "scenes-clean", "--data", unlabelled, "--require", require]
    assert told in refused(line, capsys)


@pytest.mark.parametrize(
    ("require", "more", "told"),
    [
        ("auroc>=0.9", [], "needs images of other classes; name a set (--ood)"),
        ("auroc(knn)>=0.9", ["--ood", "scenes:far-ood?samples=4"], "learns from training images; name a set (--train)"),
        ("ece_ts<=+1", [], "needs images to fit temperatures on; name a set (--dev)"),
    ],
)
def test_requirements_on_labelled_images(
    require: str, more: list[str], told: str, capsys: pytest.CaptureFixture
) -> None:
    line = ["verify", "artifact", "--against", "scenes-clean", "--data", SCENES, "--require", require, *more]
    assert told in refused(line, capsys)


def test_messages_name_arguments_as_they_were_given(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"name a set \(train=\)"):
        check(data=SCENES, scores=["knn"])
    with in_command():
        assert (option("train"), option("force", True)) == ("--train", "--force")
        with pytest.raises(InputError, match=r"name a set \(--train\)"):
            check(data=SCENES, scores=["knn"])
    assert (option("train"), option("force", True)) == ("train=", "force=True")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(data=SCENES, scores=["mcm"])  # nothing to refuse
