"""Functions timed against each other by CPU time, so that a table can be made on a machine that is not quiet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from qkernels.cpu import peak_gops


def paired(
    functions: dict[str, Callable[[], Any]],
    seconds: float = 5e-3,
    repeats: int = 9,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, float]:
    """Median seconds per call of each function, by default CPU seconds of one thread; under "peak" the INT8 peak of one
    thread, operations per second.

    Functions take turns, each for about `seconds` after a call that warms the caches; the peak is measured between.
    """
    first = next(iter(functions.values()))
    first()
    start = clock()
    first()
    calls = max(1, round(seconds / max(clock() - start, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    peaks = []
    for _ in range(repeats):
        peaks.append(peak_gops(1) * 1e9)
        for name, function in functions.items():
            function()
            start = clock()
            for _ in range(calls):
                function()
            times[name].append((clock() - start) / calls)
    return {name: statistics.median(values) for name, values in times.items()} | {"peak": statistics.median(peaks)}
