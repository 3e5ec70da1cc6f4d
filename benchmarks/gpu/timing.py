"""Contenders timed against each other: interleaved, past the L2 cache, without launch gaps.

Every contender is a function of the number of a buffer set; calls rotate through sets that together are larger than any
cache, so that each call reads device memory. One pass over the sets is captured in a CUDA graph and replayed between
two events, for small and large calls alike; what cannot be captured runs eagerly, and its row says so. Rounds of all
contenders take turns; medians and quartiles over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .machine import Machine

COLD = 256 << 20  # bytes that all buffer sets of a case hold at least: over four times the largest L2
MOST_SETS = 256
Contender = Callable[[int], Any]


def sets_for(machine: Machine, bytes_a_set: int) -> int:
    """How many buffer sets one needs for cold calls."""
    return 2 if machine.tiny else max(2, min(MOST_SETS, -(-COLD // max(1, bytes_a_set))))


def compare(
    machine: Machine,
    contenders: dict[str, Contender],
    sets: int,
    seconds: float = 0.3,
    rounds: int = 15,
    eager: tuple[str, ...] = (),
) -> dict[str, dict[str, Any]]:
    """Name -> `seconds` per call (median), `low` and `high` (quartiles), `how` ("graph" or "eager"), or `error`.

    `seconds`: what each contender may take in all, about. `eager`: contenders that bring a graph of their own.
    """
    passes: dict[str, Callable[[], None]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        try:
            passes[name], how = _one_pass(machine, contender, sets, name not in eager)
            found[name] = {"how": how, "sets": sets}
        except Exception as error:  # a rival that this torch cannot run must not cost the others their time
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            machine.usable()
    repeats = {name: _repeats(machine, run, seconds, rounds) for name, run in passes.items()}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(2 if machine.tiny else rounds):
        for name, run in passes.items():
            times[name].append(_timed(machine, run, repeats[name]) / sets)
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] |= {"seconds": middle, "low": low, "high": high, "rounds": len(values)}
    return found


def _one_pass(machine: Machine, contender: Contender, sets: int, capture: bool) -> tuple[Callable[[], None], str]:
    """One call with every buffer set, captured where possible, after calls that compile and choose what they use."""

    def run() -> None:
        for number in range(sets):
            contender(number)

    if machine.tiny or not capture:
        for _ in range(3):
            run()
        return run, "eager"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(min(3, sets)):
            contender(number)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        run()
        return run, "eager"
    return graph.replay, "graph"


def _timed(machine: Machine, run: Callable[[], None], repeats: int) -> float:
    """Seconds of one run, over `repeats`."""
    if machine.tiny:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    for _ in range(repeats):
        run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1000 / repeats


def _repeats(machine: Machine, run: Callable[[], None], seconds: float, rounds: int) -> int:
    """So many that all rounds together take about `seconds`; the runs that find out are the warm-up."""
    if machine.tiny:
        return 1
    for _ in range(2):
        once = _timed(machine, run, 1)
    return max(1, min(200, round(seconds / rounds / max(once, 1e-6))))


def copy_bandwidth(machine: Machine) -> float:
    """Bytes per second, read and written, of a device copy far larger than the cache."""
    size = 1 << 16 if machine.tiny else 1 << 31
    source, target = (torch.empty(size, dtype=torch.uint8, device=machine.device) for _ in range(2))
    source.random_()
    result = compare(machine, {"copy": lambda _: target.copy_(source)}, 1, seconds=0.15)
    return 2 * size / result["copy"]["seconds"]
