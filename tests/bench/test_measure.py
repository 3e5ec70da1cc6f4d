"""Turns: their order, who gets how many of them, and the time that all of it may take. The clock is the test's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qclip.bench import measure
from qclip.bench.budget import Budget, minutes, shares
from qclip.bench.contender import Contender, TurnError
from qclip.bench.measure import ENOUGH, TURN
from tests.bench.world import World


@pytest.fixture
def world() -> World:
    return World()


def test_contenders_take_turns_and_short_calls_are_repeated(world: World) -> None:
    short, long = world.contender("short", 0.01), world.contender("long", 0.5)
    found = measure.measure([short, long], world.budget(1000), world.say)
    assert found.times[short] == pytest.approx([0.01] * ENOUGH) and found.times[long] == pytest.approx([0.5] * ENOUGH)
    later = world.order[4:]  # after everyone's first turn: an untimed call and a timed one
    assert later.count("short") == ENOUGH * (1 + TURN / 0.01) and later.count("long") == ENOUGH * 2
    turns = [name for name, _ in itertools.groupby(later)]
    assert turns[:4] == ["short", "long", "short", "long"] or turns[:3] == ["short", "long", "short"]
    assert len(turns) > ENOUGH  # interleaved, in changing order


def test_rounds_at_half_rate_are_run_again(world: World) -> None:
    speeds = itertools.chain([100.0, 50.0, 98.0, 40.0], itertools.repeat(99.0))
    who = world.contender("a", 0.1)
    found = measure.measure([who], world.budget(1000), world.say, lambda: next(speeds))
    assert found.slow == 2 and len(found.times[who]) == ENOUGH and len(found.speeds) == ENOUGH + 2


def test_a_processor_that_stays_slow_ends_in_time(world: World) -> None:
    speeds = itertools.chain([100.0], itertools.repeat(10.0))
    who = world.contender("a", 0.1)
    found = measure.measure([who], world.budget(30), world.say, lambda: next(speeds))
    assert len(found.times[who]) == 1 and found.slow > 50 and world.now <= 30


@pytest.mark.parametrize(("seconds", "slow_turns"), [(60, range(5, 6)), (30, range(1, 3))])
def test_all_take_as_many_turns_while_there_is_time_and_the_slow_fewer_where_there_is_not(
    world: World, seconds: float, slow_turns: range
) -> None:
    fast, middle, slow = (world.contender(name, s) for name, s in (("fast", 0.1), ("middle", 0.5), ("slow", 4.0)))
    found = measure.measure([fast, middle, slow], world.budget(seconds), world.say)
    assert len(found.times[slow]) in slow_turns and len(found.times[fast]) >= len(found.times[middle]) >= 5
    assert 0.6 * seconds < world.now <= seconds


@given(
    costs=st.lists(st.floats(1e-4, 20), min_size=1, max_size=8),
    seconds=st.floats(1, 120),
)
def test_the_time_is_bounded_whatever_the_costs(costs: list[float], seconds: float) -> None:
    world = World()
    found = measure.measure([world.contender(str(i), c) for i, c in enumerate(costs)], world.budget(seconds), world.say)
    first = 2 * max(costs)  # nobody knows how long a first turn takes
    assert world.now <= max(seconds, 2 * costs[0]) + first
    assert len(found.times) + len(found.dropped) == len(costs)


def test_a_turn_that_takes_longer_than_foreseen_is_the_last(world: World) -> None:
    seconds = iter([0.5] + [20.0] * 9)

    def take(calls: int, budget: Budget) -> float:
        each = next(seconds)
        world.now += each * (1 + calls)
        return each * calls

    others = [world.contender(str(number), 2.0) for number in range(5)]
    measure.measure([others[0], Contender("drifts", "", 1.0, 1.0, take), *others[1:]], world.budget(60), world.say)
    assert world.now <= 60 + 5  # it began its turn with most of the time left


def test_who_did_not_get_a_turn_is_named_and_ours_always_has_one(world: World) -> None:
    ours, other = world.contender("ours", 30.0), world.contender("other", 1.0)
    found = measure.measure([ours, other], world.budget(10), world.say)
    assert found.times == {ours: [30.0]} and found.dropped == {other: "did not get its turn"}


def test_settings_that_cannot_be_their_peer_s_best_have_one_turn(world: World) -> None:
    best, near, far = (world.contender("p", s, setting) for s, setting in ((1.0, "best"), (1.2, "near"), (1.3, "far")))
    found = measure.measure([best, near, far], world.budget(1000), world.say)
    assert [len(found.times[who]) for who in (best, near, far)] == [ENOUGH, ENOUGH, 1]


def test_a_fast_setting_that_is_wrong_does_not_keep_the_right_one_from_its_turns(world: World) -> None:
    wrong, right = world.contender("p", 0.5, "wrong", remark="wrong"), world.contender("p", 1.0, "right")
    found = measure.measure([wrong, right], world.budget(1000), world.say)
    assert len(found.times[wrong]) == len(found.times[right]) == ENOUGH


def failing(world: World, after: int, error: Callable[[], BaseException]) -> Contender:
    turns = itertools.count()

    def take(calls: int, budget: Budget) -> float:
        if next(turns) >= after:
            raise error()
        world.now += 1.0
        return calls * 1.0

    return Contender("broken", "x", 1.0, 1.0, take)


@pytest.mark.parametrize("failed", [True, False])
def test_who_drops_out_is_named_and_keeps_what_was_measured(world: World, failed: bool) -> None:
    other = world.contender("other", 1.0)
    broken = failing(world, 3, lambda: TurnError("its process ended by SIGSEGV", failed))
    found = measure.measure([other, broken], world.budget(1000), world.say)
    assert len(found.times[other]) == ENOUGH and len(found.times[broken]) == 2
    assert found.dropped == {broken: "its process ended by SIGSEGV"}
    assert found.failed == ({"broken": "its process ended by SIGSEGV"} if failed else {})


def test_an_interruption_leaves_what_was_measured(world: World) -> None:
    other, stopped = world.contender("other", 1.0), failing(world, 4, KeyboardInterrupt)
    found = measure.measure([other, stopped], world.budget(1000), world.say)
    assert found.interrupted and len(found.times[stopped]) == 3 and 2 <= len(found.times[other]) <= 4
    before = measure.measure([failing(world, 0, KeyboardInterrupt)], world.budget(1000), world.say)
    assert before.interrupted and before.times == {}


def test_the_progress_says_who_runs_and_when_it_ends(world: World) -> None:
    ours = world.contender("ours", 1.0, "w8a8")
    measure.measure([ours], world.budget(1000), world.say)
    assert world.told[0][0] == "16:40 left, measuring ours w8a8, first call"
    assert world.told[1] == ("0:30 left, measuring ours w8a8, round 1 of 15", 2.0, 32.0)
    assert world.told[-1] == ("0:02 left, measuring ours w8a8, round 15 of 15", 30.0, 32.0)


def test_everyone_takes_as_many_turns_unless_the_slow_leave_too_few_to_the_others() -> None:
    costs, many = {"ours": 1.0, "b": 4.0, "c": 10.0}, {"ours": 15, "b": 15, "c": 15}
    assert shares(costs, many, 300.0, 5) == {"ours": 15, "b": 15, "c": 15}
    assert shares(costs, many, 100.0, 5) == {"ours": 6, "b": 6, "c": 6}
    assert shares(costs, many, 60.0, 5) == {"ours": 8, "b": 8, "c": 2}  # a third of the time is two turns of c
    assert shares(costs, many, 12.0, 5) == {"ours": 8, "b": 1, "c": 0}
    assert shares(costs, {"ours": 2, "b": 15, "c": 15}, 100.0, 5) == {"ours": 2, "b": 7, "c": 7}
    assert shares({"ours": 1.0}, {"ours": 3}, -1.0, 5) == {"ours": 0}


def test_minutes_are_as_on_a_clock() -> None:
    assert [minutes(s) for s in (-1, 0.4, 61, 750)] == ["0:00", "0:00", "1:01", "12:30"]
