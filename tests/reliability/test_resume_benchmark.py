"""`benchmarks/resume.py` must see what it is there to see."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from benchmarks import resume
from qclip.results import Results
from qclip.store import StoreWarning


def says(value: float, out: Path) -> None:
    results = Results()
    results.add(model="m", metric="top1", set="s", value=value)
    results.add(model="m", metric="ms_per_image", set="s", value=float(os.getpid()))
    results.to_json(out)


@pytest.fixture
def trials(tmp_path: Path) -> resume.Trials:
    return resume.Trials(1, 1, tmp_path)


def rerun(images: int, shard: int, store: Path, out: Path) -> None:
    """Says something else where the store was left by another run, and leaves a part of a file there."""
    store.mkdir(exist_ok=True)
    says(0.5 + 0.1 * (store / "part").exists(), out)
    (store / "part").touch()


def test_a_run_that_says_something_else_is_seen(
    trials: resume.Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "run", rerun)
    for name, store in (("one", "a"), ("same", "b"), ("other", "b")):
        trials.alone(name, tmp_path / store)
    assert [row["equal"] for row in trials.rows] == [True, True, False]  # times differ and do not count
    assert [row["leftovers"] for row in trials.rows] == [1, 1, 1]


def test_a_run_that_fails_is_seen(trials: resume.Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(images: int, shard: int, store: Path, out: Path) -> None:
        says(0.5, out)
        raise OSError("no more")

    monkeypatch.setattr(resume, "run", rerun)
    trials.alone("good", tmp_path / "a")
    monkeypatch.setattr(resume, "run", fails)
    trials.alone("bad", tmp_path / "b")
    assert [(row["exit"], row["equal"]) for row in trials.rows] == [(0, True), (1, False)]


def test_a_full_disk_is_full(trials: resume.Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def writes(images: int, shard: int, store: Path, out: Path) -> None:
        says(0.5, out)
        try:
            with open(store / "large", "wb", buffering=0) as file:
                for _ in range(4):
                    assert file.write(bytes(resume.ROOM)) == resume.ROOM
        except (OSError, AssertionError):
            warnings.warn("nothing more is kept", StoreWarning, stacklevel=1)

    monkeypatch.setattr(resume, "run", writes)
    with resume.full_disk(tmp_path / "small") as limited:
        trials.alone("full", tmp_path / "small", limited)
    assert [(row["exit"], row["warnings"], row["equal"]) for row in trials.rows] == [(0, 1, True)]
