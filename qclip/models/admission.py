"""Which shapes of a function get a program, and which keep theirs where memory is short.

Making a program costs about as much time as a number of replays save (`Costs`). It is paid from what replays have
saved, so that a mix of shapes never gets slower by it; else a shape must prove that it comes again, by `PROOF` times as
many calls as its program costs: it is expected to come as often again as it did, and half of that is to be gained. The
trace that all shapes share must be worth that to all of them. Only a shape that has a large part of the calls
(`OFTEN`), as where all batches are the same, gets its program in advance, when it comes for the second time.
How often shapes come is counted with ageing: all counts are halved now and then. A program goes only for a shape that
comes clearly more often, so shapes that take turns do not drive each other out.

All of this counts calls, not seconds, so that the same calls lead to the same programs.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Hashable

from qkernels.recording import GraphProgram, NoRoomError, Program, Workspace

AGE = 1024  # calls after which all counts are halved
GRAPHS = 4  # CUDA graphs per thread and function: each holds a memory pool
TRIED = 2  # the call of a shape at which it is first worth a thought
PROOF = 2  # calls of a shape, for each call that its program costs; and as often again for each further open size
OFTEN = 4  # calls of all shapes to one of a shape that gets its program in advance


@dataclasses.dataclass(frozen=True)
class Costs:
    """In calls: as many replays save what it takes. `trace`: one trace of a family; `derive`: a program from a family,
    and the replay that checks it; `record`: a program of a shape by itself; `credit`: what may be spent in advance, and
    the most that savings are remembered of.

    Measured with benchmarks/batches.py --costs.
    """

    trace: int = 6
    derive: int = 3
    record: int = 8
    credit: int = 36


COSTS = Costs()


class Counts:
    """How many programs were recorded (traced: a family, or a shape by itself), derived from a family, dropped to make
    room; how many attempts were refused; how many calls were replayed, how many ran the modules."""

    NAMES = ("recorded", "derived", "replayed", "modules", "dropped", "refused")

    def __init__(self, total: Counts | None = None) -> None:
        self._lock, self._total = threading.Lock(), total
        self._counts = dict.fromkeys(self.NAMES, 0)

    def add(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1
        if self._total is not None:
            self._total.add(name)

    def get(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


TOTAL = Counts()  # of this process


@dataclasses.dataclass
class Entry:
    """A shape."""

    uses: int = 0  # calls, halved with age
    tried: float = TRIED  # uses at which a program may be made
    program: Program | GraphProgram | None = None


class Shelf:
    """The shapes that a thread has called a function with. `made_for`: what all its programs depend on."""

    def __init__(self, made_for: object, counts: Counts, workspace: Workspace, costs: Costs | None = None) -> None:
        self.made_for, self._counts, self._workspace = made_for, counts, workspace
        self.costs = costs or COSTS
        self.saved, self.advance = 0, self.costs.credit
        self._entries: dict[Hashable, Entry] = {}
        self._calls = self._uses = 0  # the second halved with age

    @property
    def programs(self) -> list[Program | GraphProgram]:
        return [entry.program for entry in self._entries.values() if entry.program is not None]

    def entry(self, key: Hashable) -> Entry:
        """Count a call with this shape."""
        self._calls += 1
        if self._calls % AGE == 0:
            self._age()
        entry = self._entries.setdefault(key, Entry())
        entry.uses += 1
        self._uses += 1
        return entry

    def _age(self) -> None:
        self._uses //= 2
        for entry in self._entries.values():
            entry.uses, entry.tried = entry.uses // 2, max(TRIED, entry.tried / 2)
        self._entries = {key: e for key, e in self._entries.items() if e.uses or e.program is not None}

    def earn(self) -> None:
        """A program was replayed."""
        self._counts.add("replayed")
        self.saved = min(self.saved + 1, self.costs.credit)

    def worth(self, sizes: int = 1) -> int:
        """What a trace is worth, in calls: those of all shapes, less the programs that are made of it."""
        return sum(max(0, entry.uses - PROOF**sizes * self.costs.derive) for entry in self._entries.values())

    def spend(self, entry: Entry, cost: int, calls: int | None = None, sizes: int = 1) -> bool:
        """Whether something of this cost may be done for the shape now; it is paid for then. `calls`: those that
        prove it worth while, if not the shape's own. `sizes`: how many make a shape: two, batch and length, make so
        many that each must prove more."""
        proved = (entry.uses if calls is None else calls) >= PROOF**sizes * cost
        if self.saved >= cost or proved:
            self.saved = max(0, self.saved - cost)
        elif self.advance >= cost and entry.uses * OFTEN >= self._uses:
            self.advance -= cost
        else:
            return False
        return True

    def keep(self, entry: Entry, make: Callable[[], Program | GraphProgram], most: int | None = None) -> None:
        """Make the shape's program, of which there may be `most`. Raises NoRoomError where the programs that are there
        must not go for it, and what `make` raises."""
        while most is not None and len(self.programs) >= most:
            self._make_room(entry, NoRoomError(f"there are {most} graphs, all of which are used more often"))
        while True:
            try:
                entry.program = make()
                return
            except NoRoomError as error:
                reason = error.with_traceback(None)
            self._make_room(entry, reason)

    def _make_room(self, entry: Entry, reason: NoRoomError) -> None:
        victim = min((e for e in self._entries.values() if e.program is not None), key=lambda e: e.uses, default=None)
        if victim is None or entry.uses <= 2 * victim.uses + 2:
            raise reason
        self._counts.add("dropped")
        victim.program, victim.tried = None, 2 * victim.uses + TRIED
        self._workspace.fit()

    def refuse(self, entry: Entry, for_good: bool) -> None:
        """No program could be made: never try again, or not before the shape has come as often again."""
        self._counts.add("refused")
        entry.tried = math.inf if for_good else 2 * entry.uses

    def clear(self) -> None:
        """Drop all programs: what they depend on has changed."""
        for _ in self.programs:
            self._counts.add("dropped")
        self._entries.clear()
        self._workspace.fit()
