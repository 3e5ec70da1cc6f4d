"""No test waits for a clock or measures one: how fast a machine is decides nothing. What is waited for are events."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
GENEROUS = 300  # seconds: a limit that only a test that hangs reaches
CLOCK = re.compile(
    r"\bsleep\(|perf_counter|process_time|monotonic|\btime\.time\b|timeit"
    r"|\.(?:wait|join|get|acquire|result|communicate)\((?:timeout ?= ?)?(?P<wait>\d[\d_.]*)\)"
    r"|timeout ?= ?(?P<limit>\d[\d_.]*)"
    r"|deadline ?= ?(?!None)\w"
)
# File and a part of the line -> why the line may stand.
ALLOWED = {
    ("kernels/emulated_cuda_graph.py", "time.perf_counter()"): "stands for the clock of the GPU; no test asserts it",
    ("cli/test_common.py", 'setattr(common.time, "monotonic"'): "puts a clock of the test's own in its place",
    ("cli/test_study_live.py", 'setattr(live.time, "monotonic"'): "puts a clock of the test's own in its place",
    ("study/test_estimate.py", 'setattr(module.time, "perf_counter"'): "puts a clock of the test's own in its place",
    ("test_gpu_suite.py", "began=time.monotonic()"): "moves the beginning of a limit to an event",
}


def clocks(text: str) -> list[str]:
    """Lines that look at a clock or wait for one, generous limits aside."""
    found = []
    for line in text.splitlines():
        for match in CLOCK.finditer(line):
            seconds = match["wait"] or match["limit"]
            if seconds is None or float(seconds) < GENEROUS:
                found.append(line.strip())
                break
    return found


def test_no_test_waits_for_a_clock() -> None:
    used = set()
    for path in sorted(TESTS.rglob("*.py")):
        name = path.relative_to(TESTS).as_posix()
        for line in clocks(path.read_text()) if path != Path(__file__) else ():
            reasons = [key for key in ALLOWED if key[0] == name and key[1] in line]
            assert reasons, f"tests/{name} looks at a clock: {line!r}; wait for the event, or count the work"
            used.update(reasons)
    assert used == set(ALLOWED), "these lines are gone; take them out of ALLOWED"


@pytest.mark.parametrize(
    "line",
    [
        "time.sleep(1)",
        "assert perf_counter() - start < 60",
        "code = 'import time; time.time()'",
        "run.wait(20)",
        "run.wait(timeout=5.5)",
        "subprocess.run(command, timeout=60)",
        "thread.join(10)",
        "@settings(deadline=200)",
    ],
)
def test_the_guard_sees(line: str) -> None:
    assert clocks(f"first\n    {line}\n") == [line]


@pytest.mark.parametrize("line", ["run.wait()", "timeout=300,", "thread.join()", "deadline=None", '"".join(lines)'])
def test_the_guard_lets_events_pass(line: str) -> None:
    assert clocks(line) == []
