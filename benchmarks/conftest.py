"""What the benchmarks share: shapes, a seeded generator, and the peak that shares are taken of."""

from __future__ import annotations

import pytest
import torch

import qkernels


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def peak_gops() -> float | None:
    """INT8 peak of torch's threads on this machine in 10^9 operations per second, None without native code."""
    if not qkernels.info()["built"]:
        return None
    from qkernels.cpu import peak_gops

    return max(peak_gops() for _ in range(3))


@pytest.fixture
def rate(benchmark, peak_gops):
    """`rate(operations)`: notes operations per second and the share of the peak, from the median of the timed call."""

    def note(operations: float) -> None:
        if benchmark.stats is None:  # --benchmark-disable
            return
        gops = operations / benchmark.stats["median"] / 1e9
        benchmark.extra_info["gops"] = round(gops, 1)
        if peak_gops:
            benchmark.extra_info["percent_of_peak"] = round(100 * gops / peak_gops, 1)

    return note
