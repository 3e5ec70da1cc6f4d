"""What `qclip study run` shows while it works: a table on a terminal of any width, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from qclip.cli.study import live
from qclip.study.measure import Outcome
from qclip.study.progress import Counts
from qclip.study.store import StudyStore


@pytest.fixture
def counts(tmp_path: Path) -> Counts:
    found = Counts(120, 20, 0, StudyStore.create(tmp_path / "s"), "plan.toml")
    found.started -= 300
    return found


def task(cells: int = 10) -> Any:
    blocks = [types.SimpleNamespace(variant=types.SimpleNamespace(label="w8a8 on scenes:train[0]"))]
    return types.SimpleNamespace(model="scenes-clean", blocks=blocks, cells=["x"] * cells, key="k")


def all_of(terminal: int) -> bytes:
    """What was written to a terminal whose other end is closed: it comes in parts, and then there is an error."""
    found = b""
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 1 << 16):
            found += part
    os.close(terminal)
    return found


@pytest.mark.parametrize("columns", [80, 40])
def test_the_table_fits_a_terminal(columns: int, counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))  # of the process's own streams, which are pytest's
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with live.live(counts):
            counts.began(task(), "worker 1")
            counts.seconds = {"quantize": 3.0, "evaluate": 8000.0}
    text = all_of(ours).decode()
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")]
    assert max(map(len, lines)) <= columns and "\x1b[" in text
    told = " ".join(" ".join(lines).split())
    for each in ("cells 0 of 100 measured, 20 cached, 0 failed", "speed 0 images/s", "quantize 3 s, evaluate 2.2 h"):
        assert each in told
    assert "worker 1 scenes-clean: w8a8 on scenes:train[0]" in told  # a name is no markup


def test_plain_lines_hold_no_control_codes(
    counts: Counts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    with live.live(counts):
        for seconds in (1.0, 11.0, 12.0, 25.0):
            now[0] = seconds
            counts.began(task(), "worker 1")
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err and "\r" not in err
    assert err.count("\n") == 2 and err.count("0 of 100 measured, 20 cached, 0 failed, 0 images/s") == 2


def test_what_is_left_counts_what_is_embedded_of_a_task(counts: Counts) -> None:
    assert counts.eta is None
    counts.began(task(50), "worker 1")
    counts.progress("worker 1", "quantizing scenes-clean with w8a8", 3, 4)
    assert counts.eta is None  # that is no part of embedding
    counts.progress("worker 1", "float: scenes-test", 500, 1000)
    assert counts.eta == pytest.approx(300 / 25 * 75, rel=0.05)
    counts.ended(task(50), "worker 1", Outcome(done=["x"] * 50))
    assert counts.eta == pytest.approx(300 / 50 * 50, rel=0.05)
