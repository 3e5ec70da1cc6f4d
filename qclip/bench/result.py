"""What was measured as JSON: rows, who speaks for each peer, and sentences on what is not as it should be."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .contender import SATURATES, WRONG, Contender
from .measure import ENOUGH, Measured
from .processor import SLOW


def told(entrants: Sequence[Contender], measured: Measured, batch: int, limits: dict[str, float]) -> dict[str, Any]:
    """Rows, ratios, warnings and notes. entrants: ours first. `ours` is None where nothing was measured."""
    ours, *others = entrants
    rows = peer_rows(others, measured, batch)
    own = row(ours, measured.times[ours], batch) if ours in measured.times else None
    notes = absences(entrants, measured)
    if measured.slow:
        notes.append(
            f"{measured.slow} of {len(measured.speeds)} rounds do not count: the processor ran at less than {SLOW:.0%} "
            "of its best speed"
        )
    return {
        "rounds": len(measured.speeds) - measured.slow,
        "interrupted": measured.interrupted,
        "ours": own,
        "peers": rows,
        "ratios": {name: best["seconds"] / own["seconds"] for name, best in rows.items()} if own else {},
        "warnings": warnings(ours, rows, limits),
        "notes": notes,
    }


def row(who: Contender, times: list[float], batch: int) -> dict[str, Any]:
    """Seconds per call: median and quartiles (least and most of fewer than four); per item; cosines to float32, None
    where outputs are NaN or Inf."""
    low, median, high = (
        statistics.quantiles(times, n=4) if len(times) > 3 else (min(times), statistics.median(times), max(times))
    )
    return {
        "setting": who.setting,
        "seconds": median,
        "low": low,
        "high": high,
        "ms_per_item": 1000 * median / batch,
        "turns": len(times),
        "cosine": _finite(who.cosine),
        "least_cosine": _finite(who.least),
        "remark": who.remark,
        "instructions": who.instructions,
    }


def _finite(cosine: float) -> float | None:
    """None, which JSON can hold, for outputs that are NaN or Inf."""
    return cosine if math.isfinite(cosine) else None


def peer_rows(contenders: Iterable[Contender], measured: Measured, batch: int) -> dict[str, dict[str, Any]]:
    """Each peer's best setting - the fastest of those that are right and cannot saturate here; of all, where none is -
    with all its settings, fastest first, under `settings`."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for who in contenders:
        if who in measured.times:
            rows.setdefault(who.peer, []).append(row(who, measured.times[who], batch))
    out = {}
    for peer, settings in rows.items():
        settings.sort(key=lambda each: each["seconds"])
        out[peer] = (next((each for each in settings if not each["remark"]), settings[0])) | {"settings": settings}
    return out


def warnings(ours: Contender, rows: dict[str, dict[str, Any]], limits: dict[str, float]) -> list[str]:
    """Sentences on whoever is not right. limits: the least cosine allowed, of "ours" and of "peers"."""
    named = [("ours", ours.setting, ours.remark, _finite(ours.least))]
    named += [(p, s["setting"], s["remark"], s["least_cosine"]) for p, best in rows.items() for s in best["settings"]]
    found = []
    for peer, setting, remark, least in named:
        if remark == WRONG:
            limit = limits["ours" if peer == "ours" else "peers"]
            why = (
                "its embeddings hold NaN or Inf"
                if least is None
                else f"the least cosine of its embeddings to float32 is {least:.4f}, and rounding them to half its "
                f"bits would leave {limit:.4f}"
            )
            found.append(f"{peer} ({setting}) is wrong: {why}; its time is that of another computation")
    for peer, best in rows.items():
        unsafe = [each["setting"] for each in best["settings"] if each["remark"] == SATURATES]
        if unsafe:
            speaks = "no other setting was measured" if best["remark"] else f"{best['setting']} speaks for it"
            found.append(
                f"{peer} ({'; '.join(unsafe)}) adds products of bytes in 16 bits where there is no VNNI and can "
                f"saturate, whatever its cosine here; {speaks}"
            )
        elif best["remark"] == WRONG:
            found.append(f"{peer} has no setting that is right; the ratio is to a wrong one")
    return found


def absences(contenders: Iterable[Contender], measured: Measured) -> list[str]:
    """Sentences on whoever was measured less than the others, or not at all."""
    found = [f"{who.peer} ({who.setting}) {why}" for who, why in measured.dropped.items()]
    few = [(who, len(measured.times[who])) for who in contenders if who in measured.times]
    full = max((turns for _, turns in few), default=0)
    by_turns: dict[int, list[str]] = {}
    for who, turns in few:
        if turns < full:
            by_turns.setdefault(turns, []).append(f"{who.peer} ({who.setting})")
    for turns, names in sorted(by_turns.items()):
        found.append(f"measured in {turns} of {full} rounds, being slow: {', '.join(names)}")
    if full < min(5, ENOUGH) and not measured.interrupted:
        found.append(f"there was time for {full} rounds; --seconds gives more")
    return found
