"""Who is wrong, who speaks for a peer, and the JSON and table that say so."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from qclip.bench import contender, measure, result, table
from qclip.bench.rightness import ERROR, least_cosine
from tests.bench.world import Stand, World, ready

LIMITS = {"ours": least_cosine(8), "peers": least_cosine(8)}


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_limit_is_that_of_the_best_uniform_rounding_of_normal_values(bits: int) -> None:
    from scipy.optimize import minimize_scalar

    x = np.linspace(-8, 8, 200_001)
    density = np.exp(-x * x / 2) / np.exp(-x * x / 2).sum()
    levels = 2**bits

    def error(step: float) -> float:
        codes = np.clip(np.floor(x / step), -levels // 2, levels // 2 - 1)
        return float((density * (x - (codes + 0.5) * step) ** 2).sum())

    assert minimize_scalar(error, bounds=(0.05, 3), method="bounded").fun == pytest.approx(ERROR[bits], rel=2e-3)
    assert least_cosine(2 * bits) == least_cosine(2 * bits + 1 if bits < 4 else 16) == (1 - ERROR[bits]) ** 0.5


def found(world: World, *, saturates: bool = False, **peers: list[tuple[str, float, bool, float]]) -> dict[str, Any]:
    """Measured: ours of one second, and of each peer (setting, seconds, exact, cosine)."""
    entrants = [world.contender("ours", 1.0, "w8a8")]
    for name, settings in peers.items():
        facts = [ready(setting, exact, cosine)[1] for setting, _, exact, cosine in settings]
        seat = Stand(world, name, *((s, ("took", s)) for _, s, _, _ in settings for _ in range(40)))
        seat.ask = lambda what, number, calls, seat=seat, settings=settings: _time(seat, settings[number][1], calls)
        entrants += contender.theirs(seat, facts, saturates, LIMITS["peers"])
    measured = measure.measure(entrants, world.budget(1000), world.say)
    return result.told(entrants, measured, 4, LIMITS)


def _time(seat: Stand, seconds: float, calls: int) -> None:
    seat.until, seat.last = seat.world.now + seconds * (1 + calls), ("took", seconds * calls)


def test_a_wrong_peer_is_warned_of_by_name_and_a_right_setting_speaks_for_it() -> None:
    body = found(World(), ort=[("static", 1.5, True, 0.984), ("dynamic", 2.0, True, 0.9997)])
    assert body["peers"]["ort"]["setting"] == "dynamic" and body["ratios"] == {"ort": pytest.approx(2.0)}
    assert [each["remark"] for each in body["peers"]["ort"]["settings"]] == ["wrong", ""]
    assert len(body["warnings"]) == 1
    assert body["warnings"][0].startswith(
        "ort (static) is wrong: the least cosine of its embeddings to float32 is 0.98"
    )


@pytest.mark.parametrize("cosine", [0.99, float("nan")])
def test_a_peer_that_is_wrong_throughout_is_shown_as_such(cosine: float) -> None:
    body = found(World(), bad=[("only", 2.0, True, cosine)], good=[("only", 2.0, True, 0.9998)])
    assert body["peers"]["bad"]["remark"] == "wrong" and body["peers"]["good"]["remark"] == ""
    assert [each.split()[0] for each in body["warnings"]] == ["bad", "bad"]
    assert "no setting that is right" in body["warnings"][1]
    assert ("hold NaN or Inf" in body["warnings"][0]) == math.isnan(cosine)
    text = json.loads(json.dumps(body, allow_nan=False))
    assert (text["peers"]["bad"]["cosine"] is None) == math.isnan(cosine)
    row = table._row("bad", body["peers"]["bad"], "only", "2.00x")
    assert row[4] == ("no number" if math.isnan(cosine) else "0.99000")


@pytest.mark.parametrize("saturates", [True, False])
def test_sums_that_can_saturate_speak_for_nobody_where_there_is_no_vnni(saturates: bool) -> None:
    settings = [("default", 1.5, False, 0.9998), ("OverflowFix", 1.6, True, 0.9997)]
    body = found(World(), saturates=saturates, ov=settings)
    assert body["peers"]["ov"]["setting"] == ("OverflowFix" if saturates else "default")
    assert [("can saturate" in each and "OverflowFix speaks" in each) for each in body["warnings"]] == [
        True
    ] * saturates


def test_ours_is_held_to_the_same_limit() -> None:
    ours = contender.ours("w8a8", lambda: None, 0.99, 0.98, least_cosine(8))
    assert ours.remark == "wrong"
    assert result.warnings(ours, {}, LIMITS)[0].startswith("ours (w8a8) is wrong")
    assert contender.ours("w4a8", lambda: None, 0.99, 0.98, least_cosine(4)).remark == ""


def test_the_json_and_the_table_have_all_of_it() -> None:
    world = World()
    body = found(world, ort=[("static", 1.5, True, 0.984), ("dynamic", 20.0, True, 0.9997)])
    text = json.loads(json.dumps(body, allow_nan=False))
    assert set(text) == {"rounds", "interrupted", "ours", "peers", "ratios", "warnings", "notes"}
    row = text["peers"]["ort"]
    assert row["turns"] == 15 and row["seconds"] == row["low"] == row["high"] == pytest.approx(20.0)
    assert row["ms_per_item"] == pytest.approx(5000)
    about = {"model": "m", "tower": "image", "batch": 4, "threads": 2, "cpu": "c", "tier": "avx2", "unit": "image"}
    about |= {"recipe": "w8a8", "absent": {"openvino": "was not ready"}, "failed": {"torchao": {"why": "x", "log": ""}}}
    about |= {"unequal": {"ort": "cannot be held to avx2"}}
    about |= {"held": {"QKERNELS_CPU_TIER": "avx2"}, "percent_of_peak": 80.0, "peak_gops": 900.0}
    title, columns, rows = table.table(text | about)
    assert title == "m, image tower, batch 4, 2 threads, c, avx2" and len(columns) == len(rows[0]) == 7
    assert rows[0][:5] == ["qclip w8a8", "", "250.000", "", "1.00000"]
    assert rows[1][:4] == ["ort", "dynamic", "5000.000", "20.00x"] and rows[1][-1] == "not held alike"
    assert rows[2][:2] == ["", "static"] and rows[2][-1] == "wrong"
    assert rows[3][:2] == ["openvino", "absent"] and rows[4][:2] == ["torchao", "failed"]
    lines = table.remarks(text | about)
    assert lines[0] == "80.0 % of the INT8 peak of 900 GOPS, measured in the same run"
    assert [line.split(":")[0] for line in lines[1:5]] == ["held", "warning", "absent", "failed"]


def test_who_took_fewer_turns_is_said() -> None:
    world = World()
    entrants = [world.contender("ours", 1.0), world.contender("slow", 10.0, "eager")]
    measured = measure.measure(entrants, world.budget(100), world.say)
    notes = result.told(entrants, measured, 1, LIMITS)["notes"]
    most, few = (len(measured.times[who]) for who in entrants)
    assert few < most > 5 and notes == [f"measured in {few} of {most} rounds, being slow: slow (eager)"]
