"""`qclip controls` on the command line: one command trains, evaluates, says what it found, and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qclip
from qclip import Results
from qclip.cli import main

STUDY = [
    *("controls", "scenes-clean", "--recipe", "w2a8-lsq", "--pairs", "scenes:train", "--samples", "20", "--steps", "1"),
    *("--batch", "4", "--held-out", "0.2", "--data", "scenes:test?samples=40", "--dev", "scenes:dev?samples=40"),
    *("--seeds", "1", "--control", "float-continued", "--corruption", "brightness", "--no-cache", "--threads", "1"),
]


def told(line: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(line) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") <= 3
    return err.splitlines()[-1]


def test_one_command(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    line = [*STUDY, "--output", str(tmp_path / "out")]
    assert main(line) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("w2a8-lsq against float, means over seeds") and "report.html" in out
    assert "under brightness" in out and "NLL, temperature fitted" in out
    results = Results.from_json(tmp_path / "out" / "results.json")
    assert len(results.where(model="w2a8-lsq seed 0", metric="top1", role="id", reference="")) == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The recipe and its controls" in page and "w2a8-lsq seed 0" not in page
    assert sorted(p.name for p in (tmp_path / "out.arms").iterdir()) == [
        "float-continued-seed0",
        "float-continued-seed0.training",
        "w2a8-lsq-seed0",
        "w2a8-lsq-seed0.training",
    ]
    monkeypatch.setattr("qclip.controls.run.train", lambda *_, **__: pytest.fail("it was trained again"))
    assert main([*line, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "qclip-results"


def test_what_cannot_be_studied_is_told_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(qclip, "load_model", lambda *_, **__: pytest.fail("a model was loaded first"))
    line = [*STUDY, "--output", str(tmp_path / "out")]
    assert "computed, not trained" in told([*line, "--recipe", "w4a8"], capsys)
    assert "a control itself" in told([*line, "--recipe", "float-continued"], capsys)
    assert "unknown control 'none'" in told([*line, "--control", "none"], capsys)
    assert "unknown corruption" in told([*line, "--corruption", "rain"], capsys)
