"""What `qclip bench` prints, where, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from qclip.bench import run
from qclip.cli import common, main

ROW = {"setting": "eager", "seconds": 1.0, "low": 1.0, "high": 1.0, "ms_per_item": 500.0, "turns": 5, "cosine": 0.5}
ROW |= {"least_cosine": 0.4, "remark": "wrong", "instructions": ""}
FOUND: dict[str, Any] = {
    **{"model": "m", "recipe": "w8a8", "tower": "image", "batch": 2, "unit": "image", "threads": 1, "cpu": "c"},
    **{"tier": "avx2", "held": {}, "ours": ROW | {"remark": ""}, "peers": {"torch-fp32": ROW | {"settings": [ROW]}}},
    **{"ratios": {"torch-fp32": 1.0}, "warnings": ["torch-fp32 (eager) is wrong"], "absent": {}, "unequal": {}},
    **{"failed": {"openvino": {"why": "its process ended by SIGILL", "log": "last words"}}, "notes": ["a note"]},
    **{"percent_of_peak": 50.0, "peak_gops": 100.0, "interrupted": False},
}


def test_a_failed_peer_shows_its_last_lines_and_the_others_their_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "bench", lambda *args, **options: FOUND)
    monkeypatch.setattr("qclip.bench.processor.keep_to_cores", lambda: None)
    assert main(["bench", "m", "--peers", "none"]) == 1
    out, err = capsys.readouterr()
    assert err == "the last lines of openvino, which failed:\nlast words\n"
    assert "torch-fp32  eager" in out and "1.00x" in out and "0.50000" in out and "wrong" in out
    for line in (
        "warning: torch-fp32 (eager) is wrong",
        "failed: openvino: its process ended by SIGILL",
        "note: a note",
    ):
        assert line in out.splitlines()


@pytest.mark.parametrize("at", ["round 3", "measuring ours w8a8, first call"])
def test_ctrl_c_leaves_what_was_measured(
    at: str, tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    @contextlib.contextmanager
    def progress(**options: Any) -> Iterator:
        def report(what: str, done: int, total: int) -> None:
            if at in what:
                os.kill(os.getpid(), signal.SIGINT)

        yield report

    monkeypatch.setattr(common, "progress", progress)
    monkeypatch.setattr("qclip.bench.processor.keep_to_cores", lambda: None)
    assert main(["bench", tiny_model, "--batch", "1", "--seconds", "3000", "--peers", "none", "--json"]) == 130
    found = json.loads(capsys.readouterr().out)
    assert found["interrupted"]
    if at == "round 3":
        assert found["ours"]["turns"] == 2 and found["ours"]["seconds"] > 0
    else:
        assert found["ours"] is None
