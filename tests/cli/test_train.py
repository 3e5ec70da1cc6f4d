"""`qclip train` on the command line, and what other commands say of its recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qclip
from qclip.cli import main


def told(line: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


TRAIN = [
    "train",
    "scenes-clean",
    "--pairs",
    "scenes:train?samples=12",
    "--steps",
    "2",
    "--batch",
    "4",
    "--threads",
    "1",
]


def test_an_artifact_comes_out_and_a_second_call_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = [*TRAIN, "--recipe", "w4a8-lsq", "--samples", "11", "--output", str(tmp_path / "small"), "--json"]
    assert main(line) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["recipe"]["trained"] == {"quantizer": "lsq", "scale_start": "mse"}
    assert found["training"]["learned"] == 11 and "held_out" not in found["training"]  # a tenth of 11 is no two
    assert "training with w4a8-lsq" in err
    model = qclip.load(tmp_path / "small")
    assert model.qclip_quantization.provenance["training"]["settings"]["steps"] == 2
    assert (tmp_path / "small.training" / "log.csv").read_text().count("\n") == 3
    assert "--force" in told(line, capsys)
    assert main([*line, "--force"]) == 0


def test_nonsense_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = [*TRAIN, "--recipe", "w4a8-lsq", "--held-out", "0.4", "--rate", "10", "--output", str(tmp_path / "x")]
    assert main(line) == 1
    out, err = capsys.readouterr()
    assert out == "" and "qclip: training destroyed the model: its loss on 5 held-out pairs is" in err.splitlines()[-1]
    assert not (tmp_path / "x").exists() and list((tmp_path / "x.training").glob("step-*"))


def test_what_is_worse_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = [*TRAIN, "--recipe", "float-continued", "--held-out", "0.4", "--objective", "mse", "--rate", "1e-3"]
    assert main([*line, "--output", str(tmp_path / "x")]) == 0
    out, err = capsys.readouterr()
    assert "warning: training made the model worse: its loss on 5 held-out pairs is" in err
    assert out.startswith("loss on 5 held-out pairs: ") and "before training 0.0000" in out
    assert "worse" in qclip.load(tmp_path / "x").qclip_quantization.provenance["training"]


def test_fewer_pairs_may_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = [*TRAIN, "--recipe", "float-continued", "--output", str(tmp_path / "small"), "--json", "--samples", "6"]
    assert main([*line, "--steps", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["training"]["learned"] == 6 and found["coverage"]["float"]["macs"] == 1


def test_recipes_of_training_are_refused_where_nothing_is_trained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(qclip, "load_model", lambda *_, **__: pytest.fail("a model was loaded first"))
    wanted = "use `qclip train MODEL --recipe w4a8-lsq --pairs DATA`"
    assert wanted in told(["quantize", "photos", "--recipe", "w4a8-lsq"], capsys)
    assert wanted in told(["evaluate", "photos", "--recipe", "w4a8-lsq", "--data", "scenes:test?samples=4"], capsys)
    assert "'w4a8' is computed, not trained: use `qclip quantize`" in told(
        [*TRAIN, "--recipe", "w4a8", "--output", "x"], capsys
    )
    assert "unknown objective 'nce'" in told(
        [*TRAIN, "--recipe", "w4a8-lsq", "--output", "x", "--objective", "nce"], capsys
    )
    assert "start must lie from 0 to below 1" in told(
        [*TRAIN, "--recipe", "w4a8-lsq", "--output", "x", "--start", "1"], capsys
    )


def test_help_names_quantizers_and_objectives(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "lsq-authors" in shown and "contrastive" in shown
    assert main(["recipes"]) == 0
    assert "lsq-plus" in capsys.readouterr().out
