"""Bands of ranks: the head, the middle and the tail of a spectrum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

BANDS: dict[str, tuple[int, int | None]] = {"ranks 0-8": (0, 8), "ranks 8-64": (8, 64), "ranks 64-": (64, None)}
FLOOR = 0.01  # a gain below this counts as this, so that a band that is gone has a finite shape


def bands(rank: int) -> dict[str, slice]:
    """The bands of `BANDS` that a matrix of this rank has."""
    return {
        name: slice(start, rank if end is None else min(end, rank))
        for name, (start, end) in BANDS.items()
        if start < rank
    }


def in_band(name: str) -> dict[str, Any]:
    """The columns of a row that say its band: `at` is the band's first rank, counted from 0."""
    return {"subset": name, "axis": "band", "at": BANDS[name][0]}


def shape_of(gain: Mapping[str, float]) -> float | None:
    """log(gain of the last band / gain of the first), None with fewer than two bands or where the first has no positive
    gain. Below 0 the tail is damped more than the head; 0 for any uniform shrink."""
    head, tail = next(iter(gain.values()), math.nan), [*gain.values()][-1:]
    return math.log(max(tail[0], FLOOR) / head) if len(gain) > 1 and head > 0 else None


def level_of(gain: Mapping[str, float], energy: Mapping[str, float]) -> float:
    """The gain common to all bands: their mean, weighted by the float energy of each. It is the least-squares slope of
    the quantized weight on the float one."""
    return sum(gain[band] * energy[band] for band in gain) / sum(energy[band] for band in gain)
