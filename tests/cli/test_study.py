"""`qclip study` from the command line: a plan, a run, and what is read from it by another process."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from qclip.cli import main
from qclip.study.plan_file import read
from qclip.study.progress import Counts, running
from qclip.study.run import engine_of, prepare, run
from qclip.study.store import StudyStore
from tests.study.small import TEXT, Told

SMALL = TEXT.replace("samples=60", "samples=24").replace("samples=40", "samples=16").replace('"w4a8"', '"w4a8", "w6a8"')


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan that was run with one thread, in its default store."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "plan.toml").write_text(SMALL)
    ready = prepare(read(folder / "plan.toml"), StudyStore.create(folder / "plan.study"), threads=1)
    run(ready, engine_of(1), Told())
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def told(line: list[str], capsys: pytest.CaptureFixture, code: int = 0) -> tuple[str, str]:
    assert main(["study", *line]) == code, capsys.readouterr()
    out, err = capsys.readouterr()
    return out, err


def test_a_plan_is_shown_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(SMALL)
    out, _ = told(["plan", str(file), "--threads", "1", "--json"], capsys)
    found = json.loads(out)
    assert {name: found[name] for name in ("cells", "variants", "cached", "tasks")} == {
        "cells": 8,
        "variants": 4,
        "cached": 0,
        "tasks": 1,
    }
    assert found["images"] == 4 * (24 + 16 + 24) and found["seconds"] > 0 and found["disk_bytes"] > 0
    assert not (tmp_path / "plan.study").exists()


def test_a_run_tells_what_it_did_and_a_second_one_does_nothing(here: Path, capsys: pytest.CaptureFixture) -> None:
    out, _ = told(["run", "plan.toml", "--threads", "1", "--json"], capsys)
    assert {k: v for k, v in json.loads(out).items() if k not in ("elapsed", "seconds")} == {
        "cells": 8,
        "cached": 8,
        "done": 0,
        "failed": 0,
    }
    out, _ = told(["plan", "plan.toml", "--threads", "1", "--json"], capsys)
    assert json.loads(out)["cached"] == 8 and json.loads(out)["seconds"] == 0


def test_status_tells_what_is_there_and_who_is_at_it(here: Path, capsys: pytest.CaptureFixture) -> None:
    out, _ = told(["status", "plan.toml", "--json"], capsys)
    assert json.loads(out) == {"cells": 8, "measured": 8, "failed": 0, "runs": []}
    store = StudyStore.open(here / "plan.study")
    with Counts(8, 6, 0, store, "plan.toml").shown() as counts:
        counts.progress("worker 1", "w8a8: scenes-test", 5, 24)
        counts.changed(at_once=True)
        (seen,) = running(store)
        assert seen["left"] == 2 and seen["images"] == 5 and "worker 1" in seen["doing"]
        out, _ = told(["status", "plan.toml"], capsys)
        assert "2 to go" in out and "worker 1: w8a8: scenes-test 5/24" in out
    assert running(store) == [] and not list((store.folder / "runs").iterdir())
    shutil.rmtree(here / "plan.study" / "runtimes")  # notes of the machines: what is measured is measured without
    out, _ = told(["status", "plan.toml", "--json"], capsys)
    assert json.loads(out)["measured"] == 8


def test_a_store_that_can_only_be_read_is_read(here: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(here / "plan.study" / "locks")
    (here / "plan.study" / "locks").write_text("no folder: no lock can be made")
    for line in (["table", "plan.toml"], ["status", "plan.toml"], ["choose", "plan.toml"]):
        told(line, capsys)
    _, err = told(["compact", "plan.study"], capsys, 1)
    assert "cannot be made" in err and err.count("\n") == 1


def test_what_a_killed_run_left_is_no_run(here: Path) -> None:
    store = StudyStore.open(here / "plan.study")
    (store.folder / "runs").mkdir(exist_ok=True)
    (store.folder / "runs" / "host-1.json").write_text("{}")
    assert running(store) == [] and not list((store.folder / "runs").iterdir())


def test_tables_go_to_stdout_or_a_file(here: Path, capsys: pytest.CaptureFixture) -> None:
    out, _ = told(["table", "plan.toml"], capsys)
    assert "| w4a8" in out and "joint wins" in out
    told(["table", "plan.toml", "--format", "csv", "--output", "t.csv"], capsys)
    rows = list(csv.DictReader(io.StringIO(Path("t.csv").read_text())))
    assert {row["variant"] for row in rows} == {"float", "w8a8", "w4a8", "w6a8"}
    _, err = told(["table", "plan.toml", "--metric", "top1", "--metric", "worst_group_top1"], capsys)
    assert err == "warning: nothing of 'worst_group_top1' was measured\n"
    out, err = told(["table", "plan.toml", "--metric", "worst_group_top1"], capsys)
    assert "top1" not in out.replace("joint wins", "") and "worst_group_top1" in err
    _, err = told(["table", "plan.toml", "--output", "t.csv"], capsys, 2)
    assert "exists already" in err


def test_choose_picks_within_limits_and_says_why(here: Path, capsys: pytest.CaptureFixture) -> None:
    out, _ = told(["choose", "plan.toml", "--prefer", "top1", "--json"], capsys)
    found = json.loads(out)
    sizes = {each["variant"]: each["size"] for each in found["candidates"]}
    assert sizes["w4a8"] < sizes["w8a8"] < sizes["float"]
    limit = f"{int(sizes['w8a8'])}"
    out, _ = told(["choose", "plan.toml", "--max-size", limit, "--prefer", "ece"], capsys)
    line = next(line for line in out.splitlines() if "scenes-clean float" in line)
    assert "too large" in line and "pick: scenes-clean w" in out
    out, _ = told(["choose", "plan.toml", "--max-size", "1B"], capsys, 1)
    assert "no variant keeps all limits" in out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["choose", "plan.toml", "--max-size", "big"], "60MB"),
        (["choose", "plan.toml", "--max-latency", "soon"], "10ms"),
        (["choose", "plan.toml", "--max-loss", "top1"], "top1=0.5"),
        (["choose", "plan.toml", "--max-loss", "topp1=1"], "'top1'"),
        (["choose", "plan.toml", "--max-latency", "10ms"], "'speed'"),
        (["choose", "plan.toml", "--data", "scenes:dev"], "no evaluation"),
        (["choose", "plan.toml", "--prefer", "temperature"], "neither more nor less"),
        (["correlations", "plan.toml"], "spectra = true"),
        (["table", "plan.toml", "--metric", "topp1"], "'top1'"),
        (["table", "plan.toml", "--corruption", "gausian_noise"], "'gaussian_noise'"),
        (["table", "plan.toml", "--score", "mmc"], "'mcm'"),
        (["choose", "plan.toml", "--score", "energy"], "no score 'energy'"),
        (["status", "plan.toml", "--store", "nowhere"], "no store of studies"),
        (["compact", "nowhere"], "no store of studies"),
        (["gc", "plan.toml", "plan.toml"], "--store"),
        (["run", "missing.toml"], "no plan"),
        (["run", "plan.toml", "--workers", "2", "--ray", "auto"], "one of them"),
    ],
)
def test_bad_input_is_one_sentence(line: list[str], said: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    out, err = told(line, capsys, 2)
    assert out == "" and err.count("\n") == 1 and said in err


def test_compact_and_gc_leave_what_a_plan_needs(here: Path, capsys: pytest.CaptureFixture) -> None:
    before, _ = told(["table", "plan.toml", "--format", "csv"], capsys)
    out, _ = told(["compact", "plan.study", "--json"], capsys)
    assert json.loads(out) == {"files_before": 8, "files": 1}
    out, _ = told(["gc", "plan.toml", "--json"], capsys)
    assert json.loads(out)["files"] > 0
    assert told(["table", "plan.toml", "--format", "csv"], capsys)[0] == before
