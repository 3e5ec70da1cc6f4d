"""Functions timed against each other by CPU time, so that a table can be made on a machine that is not quiet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from qkernels.cpu import peak_gops


def paired(functions: dict[str, Callable[[], Any]], seconds: float = 5e-3, repeats: int = 9) -> dict[str, float]:
    """Median CPU seconds per call of each function on one thread; under "peak" the INT8 peak, operations per second.

    Functions take turns, each for about `seconds` after a call that warms the caches; the peak is measured between.
    """
    first = next(iter(functions.values()))
    first()
    start = time.thread_time()
    first()
    calls = max(1, round(seconds / max(time.thread_time() - start, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    peaks = []
    for _ in range(repeats):
        peaks.append(peak_gops(1) * 1e9)
        for name, function in functions.items():
            function()
            start = time.thread_time()
            for _ in range(calls):
                function()
            times[name].append((time.thread_time() - start) / calls)
    return {name: statistics.median(values) for name, values in times.items()} | {"peak": statistics.median(peaks)}
