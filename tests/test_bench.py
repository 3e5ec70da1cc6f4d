"""The stopwatch of `qclip bench`: turns, and rounds in which the processor was slow."""

import itertools

import pytest

from qclip import bench


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A clock that only the contenders move."""
    state = {"now": 0.0}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: state["now"])
    return state


def contender(clock: dict, name: str, seconds: float, order: list[str]):
    def run() -> None:
        clock["now"] += seconds * clock.get("slower", 1)
        order.append(name)

    return run


def test_contenders_take_turns_and_short_calls_are_repeated(clock: dict) -> None:
    order: list[str] = []
    runs = {"a": contender(clock, "a", 0.01, order), "b": contender(clock, "b", 0.5, order)}
    times, speeds = bench.interleave(runs, 0.0, lambda *a: None)
    assert len(speeds) == len(times["a"]) == len(times["b"]) == bench.MIN_ROUNDS
    assert times["a"] == pytest.approx([0.01] * 5) and times["b"] == pytest.approx([0.5] * 5)
    turns = [name for name, _ in itertools.groupby(order[4:])]
    assert set(turns) == {"a", "b"} and order[4:].count("a") == 5 * (1 + 5)


def test_rounds_at_half_rate_are_run_again(clock: dict) -> None:
    order: list[str] = []
    speeds = iter([100.0, 50.0, 98.0, 40.0, 99.0, 101.0, 100.0, 100.0])
    slow = []

    def probe() -> float:
        speed = next(speeds)
        slow.append(speed < 75)
        return speed

    times, seen = bench.interleave({"a": contender(clock, "a", 0.1, order)}, 1.0, lambda *a: None, probe)
    assert len(seen) == 7 and len(times["a"]) == 5
    assert sum(slow) == 2


def test_a_processor_that_stays_slow_ends_after_twice_the_time(clock: dict) -> None:
    speeds = itertools.chain([100.0], itertools.repeat(10.0))
    times, seen = bench.interleave({"a": contender(clock, "a", 0.1, [])}, 3.0, lambda *a: None, lambda: next(speeds))
    assert len(times["a"]) == 1 and len(seen) > 10


def test_a_run_that_is_slow_throughout_is_told_from_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_peak", lambda threads: {1: 100.0}[threads])
    assert bench._crowded(190.0, 2) is None
    said = bench._crowded(110.0, 2)
    assert said is not None and said.startswith("2 threads reached 55% of 2 times one thread's INT8 peak")


def test_threads_keep_to_different_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[list[int]] = []
    siblings = {0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3"}
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda pid, cpus: chosen.append(list(cpus)), raising=False)
    monkeypatch.setattr(bench.Path, "is_file", lambda path: True)
    monkeypatch.setattr(bench.Path, "read_text", lambda path: siblings[int(path.parts[5][3:])])
    for threads in (1, 2, 3):
        monkeypatch.setattr(bench.torch, "get_num_threads", lambda threads=threads: threads)
        bench.keep_to_cores()
    assert chosen == [[0], [0, 1], [0, 1, 2]]
