"""Of many variants the one to deploy: those that no other beats in everything, and one pick, with reasons."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qclip.errors import InputError, nearest
from qclip.metrics import METRICS, metric
from qclip.reporting import units

from .cells import Grid
from .found import LATENCY, MEMORY, Asked, find
from .sizes import Size, sizes
from .store import StudyStore
from .variants import FLOAT

ROUNDING = 1e-9  # 100 x 0.02 is a little more than 2
FACTORS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "b": 1.0, "": 1.0}


@dataclasses.dataclass(frozen=True)
class Limits:
    """max_size: of what is shipped (`sizes.Size`), in bytes. max_latency in ms per image. max_loss: metric -> how much
    worse than float it may be, shares in percentage points. prefer: the metric that decides among what is left."""

    prefer: str
    max_size: float | None = None
    max_latency: float | None = None
    max_loss: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Candidate:
    """A variant: what it costs, the numbers that are asked of it, and why it is not the pick ("" of the pick). size: of
    what is shipped, in bytes; memory: of all its tensors once loaded; bits: of what is shipped, for each weight."""

    model: str
    variant: str
    size: float | None
    latency: float | None
    preferred: float | None
    losses: dict[str, tuple[float, float | None]]  # metric -> worse than float by, and the interval's worse end
    why: list[str] = dataclasses.field(default_factory=list)
    beaten_by: str = ""
    memory: float | None = None
    bits: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.variant}"


def choose(
    grid: Grid, store: StudyStore, limits: Limits, evaluation: str | None = None, score: str | None = None
) -> list[Candidate]:
    """Every variant that was measured on an evaluation (default: the plan's first): the pick first, then those that no
    other beats, then the rest. Raises InputError where a limit names nothing that was measured."""
    for name in (limits.prefer, *limits.max_loss):
        if name not in METRICS:
            raise InputError(f"unknown metric {name!r}; {nearest(name, METRICS)}")
        if not metric(name).better:
            raise InputError(f"neither more nor less of {name!r} is better, so it chooses nothing; name another metric")
    known = [sets.data for sets in grid.plan.sets]
    evaluation = evaluation or known[0]
    if evaluation not in known:
        raise InputError(f"{evaluation!r} is no evaluation of the plan; {nearest(evaluation, known)}")
    asked = Asked(tuple(dict.fromkeys((limits.prefer, *limits.max_loss, MEMORY, LATENCY))), score)
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in find(grid, store, asked).lines:
        if line["evaluation"] == evaluation and not line["corruption"]:
            by.setdefault((line["model"], line["variant"]), []).append(line)
    known_sizes = sizes(grid, store)
    found = [_candidate(*name, lines, limits, known_sizes[name]) for name, lines in by.items()]
    if limits.max_latency is not None and all(each.latency is None for each in found):
        raise InputError(
            "no time per image was measured; let the plan's `measurements` have 'speed', or drop the limit"
        )
    if all(each.preferred is None for each in found):
        raise InputError(f"{limits.prefer} was not measured on {evaluation}; prefer another metric")
    side = metric(limits.prefer).better
    for each in found:
        each.why += _broken(each, limits)
        beaten = next((other for other in found if _beats(other, each, side)), None)
        each.beaten_by = beaten.name if beaten else ""
    return sorted(found, key=lambda each: _order(each, side))


def _candidate(model: str, variant: str, lines: Sequence[Mapping[str, Any]], limits: Limits, size: Size) -> Candidate:
    def value(name: str) -> float | None:
        values = [
            line["value"] for line in lines if line["metric"] == name and line["role"] in ("id", "model", "ood-mean")
        ]
        values = values or [line["value"] for line in lines if line["metric"] == name]
        return values[0] if values and not math.isnan(values[0]) else None

    losses: dict[str, tuple[float, float | None]] = {}
    undefined: set[str] = set()
    for name in limits.max_loss:
        side, scale = metric(name).better, 100 if metric(name).unit == "share" else 1
        for line in lines:
            if line["metric"] == name and line["role"] in ("id", "ood", "ood-near", "ood-far"):
                gap, ends = line["difference"], (line["difference_low"], line["difference_high"])
                if variant == FLOAT:
                    gap, ends = 0.0, (0.0, 0.0)
                if gap is None or math.isnan(gap):  # of one set undefined: what it loses at the most is not known
                    undefined.add(name)
                    continue
                worst = ends[0] if side > 0 else ends[1]
                # + 0.0: no loss is 0, not -0
                lost = (-side * gap * scale + 0.0, None if worst is None else -side * worst * scale + 0.0)
                if name not in losses or lost[0] > losses[name][0]:  # of several sets the one that loses most
                    losses[name] = lost
    losses = {name: lost for name, lost in losses.items() if name not in undefined}
    costs = size.bytes, value(LATENCY)
    return Candidate(model, variant, *costs, value(limits.prefer), losses, memory=value(MEMORY), bits=size.bits)


def _broken(each: Candidate, limits: Limits) -> list[str]:
    """The limits that it does not keep."""
    out = []
    if each.preferred is None:
        out.append(f"{limits.prefer} is undefined or was not measured")
    if limits.max_size is not None and each.size is None:
        out.append("its size is not known: its artifact is not in the store")
    elif limits.max_size is not None and each.size is not None and each.size > limits.max_size:
        out.append(f"too large: {units.size(each.size)}")
    if limits.max_latency is not None and (each.latency is None or each.latency > limits.max_latency):
        out.append(f"too slow: {units.milliseconds(each.latency)}")
    for name, most in limits.max_loss.items():
        if name not in each.losses:
            out.append(f"its loss of {name} is undefined or was not measured")
        elif each.losses[name][0] > most + ROUNDING:
            out.append(f"loses {each.losses[name][0]:.2f} of {name}")
    return out


def _costs(each: Candidate, side: int) -> list[float | None]:
    """Numbers of which less is better."""
    preferred = None if each.preferred is None else -side * each.preferred
    return [each.size, each.latency, preferred, *(each.losses[name][0] for name in sorted(each.losses))]


def _beats(one: Candidate, other: Candidate, side: int) -> bool:
    """At least as good in everything, and better in something."""
    mine, theirs = _costs(one, side), _costs(other, side)
    if len(mine) != len(theirs):
        return False
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    return bool(pairs) and all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _order(each: Candidate, side: int) -> tuple[Any, ...]:
    preferred = math.inf if each.preferred is None else -side * each.preferred
    return bool(each.why), preferred if not each.why else bool(each.beaten_by), each.size or math.inf, each.name


def size(text: str) -> float:
    """Bytes of "60MB", "1.5 GB", "4096". Raises InputError."""
    found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([kKmMgG]?[bB]?)\s*", text)
    if found is None or found[2].lower() not in FACTORS:
        raise InputError(f"{text!r} is no size; write 60MB, 1.5GB or a number of bytes")
    return float(found[1]) * FACTORS[found[2].lower()]


def milliseconds(text: str) -> float:
    """Of "10ms", "0.5 s", "10". Raises InputError."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*(ms|s|)\s*", text)
    if found is None:
        raise InputError(f"{text!r} is no time; write 10ms or 0.5s")
    return float(found[1]) * (1000 if found[2] == "s" else 1)


def losses(texts: Sequence[str]) -> dict[str, float]:
    """Of "top1=0.5". Raises InputError."""
    out = {}
    for text in texts:
        name, equals, number = text.partition("=")
        if not equals or not re.fullmatch(r"-?\d{1,6}(\.\d{1,6})?", number):
            raise InputError(f"{text!r} is no largest loss; write METRIC=POINTS, as in top1=0.5")
        if name in out:
            raise InputError(f"a largest loss of {name!r} is given twice; once is enough")
        out[name] = float(number)
    return out
