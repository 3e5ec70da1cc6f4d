"""Contenders take turns: interleaved rounds, within the time that is left."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from .budget import Budget, minutes, shares
from .contender import Contender, TurnError
from .prepare import Say
from .processor import SLOW

ENOUGH, FEW = 15, 5  # rounds that count: more change no median; who is slow may be left out for others to have so many
TURN = 0.05  # seconds that one timed turn lasts at least
NEAR = 1.25  # a peer's setting that takes longer than this times its best one's speaks for nobody: one turn is enough


@dataclasses.dataclass
class Measured:
    """times: seconds per call, a value for each turn that counts, of everyone who had one. speeds: of the processor
    after each round; slow: how many rounds did not count. dropped: why somebody has no (more) times. failed: peer ->
    what went wrong."""

    times: dict[Contender, list[float]]
    speeds: list[float]
    slow: int
    dropped: dict[Contender, str]
    failed: dict[str, str]
    interrupted: bool = False


def measure(
    contenders: Sequence[Contender], budget: Budget, say: Say, probe: Callable[[], float | None] = lambda: None
) -> Measured:
    """Everyone's first turn, then rounds of turns in changing order, until all have `ENOUGH` or no turn fits any more.

    The first contender, ours, goes first and has its first turn whatever the time. After a round `probe` tells the
    processor's speed: a round far slower than the best (both threads on one core, a busy neighbour) does not count. Who
    is slow takes fewer turns. Ctrl-C (KeyboardInterrupt) ends it, and what was measured stays.
    """
    run = _Run(budget, say, probe)
    try:
        run.first_turns(contenders)
        run.rounds()
    except KeyboardInterrupt:
        run.interrupted = True
    return run.result()


class _Run:
    def __init__(self, budget: Budget, say: Say, probe: Callable[[], float | None]) -> None:
        self.budget, self.say, self.probe = budget, say, probe
        self.first: dict[Contender, float] = {}
        self.calls: dict[Contender, int] = {}
        self.dropped: dict[Contender, str] = {}
        self.failed: dict[str, str] = {}
        self.done: list[tuple[float, dict[Contender, float]]] = []  # speed of the processor, times, round by round
        self.interrupted = False

    def first_turns(self, contenders: Sequence[Contender]) -> None:
        for number, who in enumerate(contenders):
            if number and self.budget.left() <= 0:
                self.dropped[who] = "did not get its turn"
                continue
            self._report(f"{_name(who)}, first call", self.budget.left())
            if (took := self._turn(who, 1)) is not None:
                self.first[who] = took
                self.calls[who] = max(1, math.ceil(TURN / max(took, 1e-9)))

    def rounds(self) -> None:
        order = self._near()
        credit = dict.fromkeys(order, 1.0)
        while order := [who for who in order if who not in self.dropped]:
            counted = self.counted()
            wanted = {who: ENOUGH - sum(who in times for _, times in counted) for who in order}
            costs = {who: self._cost(who) for who in order}
            turns = shares(costs, wanted, self.budget.left(), max(1, FEW - len(counted)))
            most = max(turns.values())
            if most <= 0:
                return
            times: dict[Contender, float] = {}
            for who in order:
                if turns[who] <= 0 or credit[who] < 1 or costs[who] > self.budget.left():
                    continue
                need = sum(costs[each] * turns[each] for each in order)
                self._report(f"{_name(who)}, round {len(self.done) + 1} of {len(self.done) + most}", need)
                if (took := self._turn(who, self.calls[who])) is not None:
                    times[who] = took
                    credit[who] -= 1
            for who in order:
                credit[who] = min(1.0, credit[who] + turns[who] / most)
            if not times:
                return
            self.done.append((self.probe() or 1.0, times))
            order = order[1:] + order[:1] if len(self.done) % 2 else order[::-1]

    def counted(self) -> list[tuple[float, dict[Contender, float]]]:
        best = max((speed for speed, _ in self.done), default=0.0)
        return [each for each in self.done if each[0] >= SLOW * best]

    def result(self) -> Measured:
        counted = self.counted()
        times = {}
        for who, first in self.first.items():
            times[who] = [turn[who] for _, turn in counted if who in turn] or [first]
        speeds = [speed for speed, _ in self.done]
        slow = len(speeds) - len(counted)
        return Measured(times, speeds, slow, self.dropped, self.failed, self.interrupted)

    def _near(self) -> list[Contender]:
        """Those whose first turn says that they may be their peer's best, or faster than the best that is trusted."""
        limit: dict[str, float] = {}
        for trusted in (False, True):  # those that are trusted have the last word
            for peer in {who.peer for who in self.first}:
                all_times = [took for who, took in self.first.items() if who.peer == peer and who.trusted >= trusted]
                if all_times:
                    limit[peer] = NEAR * min(all_times)
        return [who for who, took in self.first.items() if took <= limit[who.peer]]

    def _cost(self, who: Contender) -> float:
        """Seconds of a turn with its untimed call, by what was seen last."""
        seen = [times[who] for _, times in self.done[-3:] if who in times] or [self.first[who]]
        return statistics.median(seen) * (1 + self.calls[who])

    def _turn(self, who: Contender, calls: int) -> float | None:
        try:
            return who.take(calls, self.budget) / calls
        except TurnError as why:
            self.dropped[who] = str(why)
            if why.failed:
                self.failed.setdefault(who.peer, str(why))
            return None

    def _report(self, what: str, need: float) -> None:
        need = max(0.0, min(need, self.budget.left()))
        spent = self.budget.spent()
        self.say(f"{minutes(need)} left, measuring {what}", spent, spent + need)


def _name(who: Contender) -> str:
    return f"{who.peer} {who.setting}"
