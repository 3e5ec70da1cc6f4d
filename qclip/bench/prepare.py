"""Peers are made ready: exported, quantized, compiled, each in its process, within a share of the time."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from .budget import Budget, minutes
from .seat import Sitting

SHARE = 0.6  # of the whole time, for preparing at most
TICK, GRACE = 0.1, 0.05  # seconds between looks; share of the whole time that an interrupted peer has to stop

Say = Callable[[str, float, float], None]  # (what, seconds spent, seconds in all)


@dataclasses.dataclass
class Prepared:
    """ready: each peer's settings, in the order in which it numbers them. late: peer -> why (more of) it did not get
    ready in time. failed: peer -> what went wrong."""

    ready: dict[str, list[dict[str, Any]]]
    late: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)


def prepare(seats: Iterable[Sitting], budget: Budget, at_once: int, say: Say) -> Prepared:
    """One setting of every peer, then a second one of each, and so on, `at_once` at the same time, until all are ready
    or `SHARE` of the time is over."""
    waiting, busy = deque(seats), deque[Sitting]()
    found = Prepared({seat.name: [] for seat in waiting})
    untouched, ends = {seat.name for seat in waiting}, SHARE * budget.seconds
    all_peers = len(waiting)
    while (waiting or busy) and budget.spent() < ends:
        while waiting and len(busy) < at_once:
            seat = waiting.popleft()
            untouched.discard(seat.name)
            seat.ask("prepare")
            busy.append(seat)
        for seat in list(busy):
            if (answer := seat.answer(TICK)) is None:
                continue
            busy.remove(seat)
            if answer[0] == "ready":
                found.ready[seat.name].append(answer[1])
                waiting.append(seat)
            elif answer[0] in ("failed", "ended"):  # what was ready before can be measured, if the process is there
                found.failed[seat.name] = answer[1]
                if answer[0] == "ended":
                    found.ready[seat.name].clear()
        now = " and ".join(f"{seat.name} ({seat.doing})" for seat in busy) or "peers"
        done = all_peers - sum(not found.ready[seat.name] for seat in (*waiting, *busy))
        left = minutes(budget.left())
        say(f"{left} left, {done} of {all_peers} peers ready; preparing {now}", budget.spent(), budget.seconds)
    _stop(busy, waiting, untouched, found, budget)
    return found


def _stop(busy: deque[Sitting], waiting: deque[Sitting], untouched: set[str], found: Prepared, budget: Budget) -> None:
    after = minutes(budget.spent())
    for seat in waiting:
        why = "did not get its turn to be prepared" if seat.name in untouched else "has more settings, not prepared"
        found.late[seat.name] = f"{why} in {after}"
    for seat in busy:
        found.late[seat.name] = f"was not ready after {after}, at: {seat.doing}"
        seat.interrupt()
    for seat in busy:
        answer = None
        until = budget.spent() + GRACE * budget.seconds
        while answer is None and budget.spent() < until:
            answer = seat.answer(TICK)
        if answer is None or answer[0] == "ended":  # in the middle of a call that nothing interrupts
            found.ready[seat.name].clear()
            seat.end()
        elif answer[0] == "ready":
            found.ready[seat.name].append(answer[1])
            del found.late[seat.name]
        elif answer[0] == "done":
            del found.late[seat.name]
