"""Streams that are closed, full, gone or of few characters, and terminals of odd shape."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import qclip
from qclip.cli import process
from tests.hostile import processes

pytestmark = pytest.mark.slow  # starts the program again and again

QCLIP = f"{sys.executable} -m qclip"
ODD = "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{CHECK MARK} \x1b[2J"


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    results = qclip.Results(notes=[ODD])
    for number in range(300):  # more than any buffer of a stream holds
        results.add(metric="top1", model=f"{ODD} {number % 3}", set=f"set {number // 3}", value=0.5)
    results.to_json("results.json")


def shut(*streams: int) -> None:
    """As Python finds streams that were closed before it started."""
    for number in streams:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def full(*streams: int) -> None:
    for number in streams:
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def gone(*streams: int) -> None:
    """Pipes that nobody reads any more."""
    for number in streams:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, number)


def encoded(encoding: str) -> None:
    sys.stdout, sys.stderr = (open(number, "w", encoding=encoding, closefd=False) for number in (1, 2))


def clean(said: str) -> None:
    assert "Traceback" not in said and "Exception ignored" not in said and "\x1b[2J" not in said, said


@pytest.mark.parametrize(
    ("how", "streams", "code", "says"),
    [
        (shut, (1,), 0, ""),
        (shut, (2,), 0, ""),
        (shut, (0,), 0, ""),
        (shut, (0, 1, 2), 0, ""),
        (full, (1,), 1, "qclip: stdout could not be written: No space left on device\n"),
        (full, (2,), 0, ""),
        (full, (1, 2), 1, ""),
        (gone, (1,), 1, ""),
        (gone, (2,), 0, ""),
        (gone, (1, 2), 1, ""),
    ],
)
def test_closed_full_and_broken_streams(how, streams: tuple[int, ...], code: int, says: str, folder: Path) -> None:
    line = ["report", "results.json", "--json", "--output", "page.html"]
    found, out, err = processes.run(line, folder, how, *streams)
    clean(out + err)
    assert (found, err) == (code, says)
    assert Path("page.html").read_text().endswith("</html>")  # no stream was taken for a file, or the other way round
    assert (len(json.loads(out)["rows"]) == 300) if 1 not in streams else out == ""
    assert sorted(p.name for p in Path().iterdir()) == ["page.html", "results.json"]


@pytest.mark.parametrize(
    "line",  # the help starts in a moment
    ["--help >&-", "--help 2>&-", "recipes <&- >&- 2>&-", "recipes | head -c 1", "--help > >(exec true)"],
)
def test_the_program_itself(line: str) -> None:
    done = subprocess.run(["bash", "-c", f"{QCLIP} {line}"], capture_output=True, text=True)
    clean(done.stdout + done.stderr)
    assert done.stderr == "" and (done.stdout == "" or done.stdout.strip().startswith(("p", "Usage")))


@pytest.mark.parametrize(
    ("line", "environment"),
    [
        ("--help", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb"}),
        ("recipes w8a9", {"PYTHONIOENCODING": "ascii", "COLUMNS": "20"}),
    ],
)
def test_the_program_itself_in_odd_places(environment: dict[str, str], line: str) -> None:
    done = subprocess.run([*QCLIP.split(), *line.split()], capture_output=True, env={**os.environ, **environment})
    clean((done.stdout + done.stderr).decode())
    assert done.returncode == (0 if line == "--help" else 2) and (done.stdout or done.stderr)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_few_characters(encoding: str, folder: Path) -> None:
    for line in (["report", "results.json"], ["recipes"], ["recipes", ODD], ["evaluate", "--help"]):
        code, out, err = processes.run(line, folder, encoded, encoding)
        clean(out + err)
        assert code == (2 if ODD in line else 0) and bool(out) != bool(err)
    code, out, err = processes.run(["report", "results.json", "--json"], folder, encoded, encoding)
    assert code == 0 and json.loads(out)["rows"][0]["model"] == f"{ODD} 0"


@pytest.mark.parametrize(
    "environment", [{"TERM": "dumb", "COLUMNS": "20"}, {"COLUMNS": "0"}, {"COLUMNS": "x", "LINES": "-3"}]
)
def test_odd_terminals(environment: dict[str, str], folder: Path) -> None:
    for line in (["report", "results.json"], ["recipes"], ["--help"], ["evaluate", "--help"]):
        code, out, err = processes.run(line, folder, **environment)
        clean(out + err)
        assert (code, err) == (0, "") and out


def test_names_that_are_no_utf8(folder: Path) -> None:
    """A file name is bytes; what is no UTF-8 in it is printed as an escape and stored as JSON can."""
    name = os.fsdecode(b"caf\xe9")
    os.rename("results.json", name + ".json")
    code, _, err = processes.run(["report", name + ".json", "--json", "--output", name], folder)
    assert code == 0, err
    assert sorted(os.listdir()) == [name, name + ".json"]
    results = qclip.Results(meta={"command": name})
    assert qclip.Results.from_json(results.to_json("again.json")).meta == {"command": name}
    assert qclip.report(results, "again.html").read_text()


def test_a_command_under_nohup_goes_on() -> None:
    """A signal that the caller ignores stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process.endings() as ending:
            os.kill(os.getpid(), signal.SIGHUP)
        assert ending.received is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
