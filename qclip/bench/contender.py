"""Who takes part: our tower in this process, and the settings of peers in theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from .budget import Budget
from .case import Run
from .prepare import GRACE, TICK
from .seat import Sitting
from .worker import timed

WRONG, SATURATES = "wrong", "can saturate"


class TurnError(Exception):
    """A contender has dropped out: it `failed`, or just did not come back in time. The message says which."""

    def __init__(self, message: str, failed: bool = True) -> None:
        super().__init__(message)
        self.failed = failed


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """One setting. cosine, least: of its outputs to float32, mean and least. take: seconds of so many calls after an
    untimed one, or TurnError. remark: why it cannot speak for its peer (`WRONG`, `SATURATES`), or nothing."""

    peer: str
    setting: str
    cosine: float
    least: float
    take: Callable[[int, Budget], float]
    remark: str = ""
    instructions: str = ""

    @property
    def trusted(self) -> bool:
        return not self.remark


def ours(setting: str, run: Run, cosine: float, least: float, limit: float) -> Contender:
    remark = WRONG if not least >= limit else ""  # NaN is wrong
    return Contender("ours", setting, cosine, least, lambda calls, budget: timed(run, calls), remark)


def theirs(seat: Sitting, ready: list[dict[str, Any]], saturates: bool, limit: float) -> Iterator[Contender]:
    """The settings of a seat that are ready, in the order in which its process numbers them."""
    for number, facts in enumerate(ready):
        wrong, unsafe = not facts["least"] >= limit, saturates and not facts["exact"]
        yield Contender(
            seat.name,
            facts["setting"],
            facts["cosine"],
            facts["least"],
            lambda calls, budget, number=number: _remote(seat, number, calls, budget),  # type: ignore[misc]
            WRONG if wrong else SATURATES if unsafe else "",
            facts["instructions"],
        )


def _remote(seat: Sitting, number: int, calls: int, budget: Budget) -> float:
    seat.ask("time", number, calls)
    while (answer := seat.answer(TICK)) is None:
        if budget.left() < -GRACE * budget.seconds:
            seat.end()
            raise TurnError("did not come back in time", failed=False)
    if answer[0] != "took":
        seat.end()
        raise TurnError(answer[1])
    return answer[1]
