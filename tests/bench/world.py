"""A world with a clock of its own, which moves when somebody in it works, and peers without a process."""

from __future__ import annotations

import dataclasses
from typing import Any

from qclip.bench.budget import Budget
from qclip.bench.contender import Contender

NEVER = float("inf")


@dataclasses.dataclass
class World:
    """now: seconds. told: what the progress was told. order: who worked, one after the other."""

    now: float = 0.0
    told: list[tuple[str, float, float]] = dataclasses.field(default_factory=list)
    order: list[str] = dataclasses.field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def budget(self, seconds: float) -> Budget:
        return Budget(seconds, self.clock)

    def say(self, what: str, done: float, total: float) -> None:
        self.told.append((what, done, total))

    def contender(
        self, name: str, seconds: float, setting: str = "", remark: str = "", cosine: float = 1.0
    ) -> Contender:
        """Its turn takes an untimed call and the timed ones, of `seconds` each."""

        def take(calls: int, budget: Budget) -> float:
            self.order += [name] * (1 + calls)
            self.now += seconds * (1 + calls)
            return seconds * calls

        return Contender(name, setting, cosine, cosine, take, remark)


class Stand:
    """A peer of `World`. steps: seconds and answer of each preparation. deaf: interrupts do not reach it."""

    saturates = False

    def __init__(self, world: World, name: str, *steps: tuple[float, tuple], deaf: bool = False) -> None:
        self.world, self.name, self.doing, self.deaf = world, name, "exporting", deaf
        self.steps, self.until, self.ended = list(steps), NEVER, False
        self.last: tuple = ("done",)

    def ask(self, *order: Any) -> None:
        self.world.order.append(self.name)
        seconds, self.last = self.steps.pop(0) if self.steps else (0.0, ("done",))
        self.until = self.world.now + seconds

    def answer(self, seconds: float) -> tuple | None:
        if self.until > self.world.now + seconds:
            self.world.now += seconds
            return None
        self.world.now = max(self.world.now, self.until)
        return self.last

    def interrupt(self) -> None:
        if not self.deaf:
            self.until, self.last = self.world.now, ("stopped",)

    def end(self) -> None:
        self.ended = True

    def log(self) -> str:
        return ""


def ready(setting: str, exact: bool = True, cosine: float = 1.0) -> tuple:
    return "ready", {"setting": setting, "exact": exact, "instructions": "", "cosine": cosine, "least": cosine}
