"""The time that a benchmark may take, and who gets how much of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Key = TypeVar("Key")


class Budget:
    """`seconds` from now on, by a clock that only goes forward."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock = seconds, clock
        self._began = clock()

    def spent(self) -> float:
        return self._clock() - self._began

    def left(self) -> float:
        return self.seconds - self.spent()


def minutes(seconds: float) -> str:
    """As "0:07" or "12:30"."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"


def shares(costs: Mapping[Key, float], wanted: Mapping[Key, int], left: float, few: int) -> dict[Key, int]:
    """How many turns each gets in the seconds that are left.

    As many for everybody, if these are `few` or more. Otherwise the slowest but the first key, ours, takes as many as
    its share of the time allows, so that the others take more; then the next one. costs: seconds of a turn. wanted:
    turns at most.
    """
    turns: dict[Key, int] = {}
    waiting = list(costs)
    while waiting:
        alike = _alike(waiting, costs, wanted, left)
        if alike >= min(few, max(wanted[key] for key in waiting)) or len(waiting) == 1:
            return {key: turns.get(key, min(alike, wanted[key])) for key in costs}
        slowest = max(waiting[1:], key=lambda key: costs[key])
        turns[slowest] = max(0, min(wanted[slowest], int(left / len(waiting) / costs[slowest])))
        left -= turns[slowest] * costs[slowest]
        waiting.remove(slowest)
    return turns


def _alike(waiting: list[Key], costs: Mapping[Key, float], wanted: Mapping[Key, int], left: float) -> int:
    """The most turns that all of them can take in the time; more than one wants are as many as it wants."""
    for turns in range(max(wanted[key] for key in waiting), 0, -1):
        if sum(costs[key] * min(turns, wanted[key]) for key in waiting) <= left:
            return turns
    return 0
