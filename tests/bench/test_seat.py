"""A peer's process: what it prints stays there, and so do its crashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qclip.bench import seat as seats
from qclip.bench.case import Case
from qclip.errors import InputError

PEERS = """
import os, sys, time
import torch
from qclip.bench.peers import Setting

def talk(words):
    print("print", words)
    print("stderr", words, file=sys.stderr)
    os.write(1, f"fd 1 {words}\\n".encode())  # as C++ does
    os.write(2, f"fd 2 {words}\\n".encode())
    os.system(f"echo child {words}")

class Talker:
    name, needs, held_by = "talker", (), ()
    def settings(self, case):
        talk("preparing")
        case.say("exporting")
        yield Setting("first", lambda: (talk("calling"), case.original(case.x))[1])
        yield Setting("noisy", lambda: case.original(case.x) + 0.5, exact=False, instructions="avx2")
        raise RuntimeError("no such\\noperator")

class Stuck:
    name, needs, held_by = "stuck", (), ()
    def settings(self, case):
        yield Setting("first", lambda: case.original(case.x))
        case.say("waiting for ever")
        try:
            while True:
                os.read(os.pipe()[0], 1)  # an interrupt ends the call
        except Exception:
            talk("an exception is caught")

class Crash:
    name, needs, held_by = "crash", (), ()
    def settings(self, case):
        talk("before the crash")
        os.abort()
        yield
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], seats.Seat]]:
    """A seat of a peer of the file above, with a linear map for a model."""
    (tmp_path / "bench_peers.py").write_text(PEERS)
    monkeypatch.syspath_prepend(tmp_path)
    import bench_peers

    model, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
    seats.write_model(model, tmp_path)
    started = []

    def make(name: str) -> seats.Seat:
        case = Case(model, "image", x, 1, tmp_path)
        started.append(seats.Seat(name.lower(), getattr(bench_peers, name), case, model(x).detach()))
        return started[-1]

    yield make
    for each in started:
        each.end()


def hear(seat: seats.Seat) -> tuple:
    answer = seat.answer(300)
    assert answer is not None
    return answer


def test_what_a_peer_prints_stays_in_its_log(start: Callable, capfd: pytest.CaptureFixture) -> None:
    seat = start("Talker")
    seat.ask("prepare")
    kind, facts = hear(seat)
    assert kind == "ready" and facts["setting"] == "first" and facts["exact"] and facts["least"] == pytest.approx(1)
    assert seat.doing == "first call, first"
    seat.ask("prepare")
    _, noisy = hear(seat)
    assert noisy["least"] < noisy["cosine"] < 0.999 and not noisy["exact"] and noisy["instructions"] == "avx2"
    seat.ask("time", 0, 3)
    kind, seconds = hear(seat)
    assert kind == "took" and seconds > 0
    seat.ask("prepare")
    assert hear(seat) == ("failed", "RuntimeError: no such operator")
    seat.ask("time", 1, 1)
    assert hear(seat)[0] == "took"  # what was ready can still be measured
    assert capfd.readouterr() == ("", "")
    seat.ask("time", 0, 1)
    hear(seat)
    for stream in ("print", "stderr", "fd 1", "fd 2", "child"):
        assert f"{stream} calling" in seat.log(), stream


def test_an_interrupt_stops_a_peer_that_is_being_prepared_and_keeps_what_is_ready(start: Callable) -> None:
    seat = start("Stuck")
    seat.ask("prepare")
    assert hear(seat)[0] == "ready"
    seat.interrupt()  # between two orders it means nothing
    seat.ask("prepare")
    while seat.doing != "waiting for ever":
        assert seat.answer(0.01) is None
    seat.interrupt()
    assert hear(seat) == ("stopped",) and "caught" not in seat.log()
    seat.ask("time", 0, 1)
    assert hear(seat)[0] == "took"
    seat.end()
    seat.ask("time", 0, 1)
    assert hear(seat)[0] == "ended"


def test_a_crash_is_told_with_its_last_lines(start: Callable, capfd: pytest.CaptureFixture) -> None:
    seat = start("Crash")
    seat.ask("prepare")
    assert hear(seat) == ("ended", "its process ended by SIGABRT")
    assert "fd 2 before the crash" in seat.log() and capfd.readouterr() == ("", "")


def test_a_model_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.extra = lambda: None
    with pytest.raises(InputError, match="cannot be sent to its peers' processes"):
        seats.write_model(model, tmp_path)


def test_a_peer_of_the_script_itself_is_refused(tmp_path: Path) -> None:
    mine = type("Mine", (), {"__module__": "__main__"})
    with pytest.raises(InputError, match="put Mine into a file"):
        seats.Seat("mine", mine, Case(torch.nn.Linear(2, 2), "image", torch.zeros(1, 2), 1, tmp_path), torch.zeros(1))
