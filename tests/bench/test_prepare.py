"""Peers are made ready in turn, within their share of the time."""

from __future__ import annotations

import pytest

from qclip.bench import prepare
from tests.bench.world import NEVER, Stand, World, ready


@pytest.fixture
def world() -> World:
    return World()


def test_every_peer_s_first_setting_comes_before_any_second(world: World) -> None:
    seats = [Stand(world, name, (1.0, ready("one")), (1.0, ready("two"))) for name in "abc"]
    found = prepare.prepare(seats, world.budget(100), 1, world.say)
    assert world.order == ["a", "b", "c"] * 3  # the third time they say that they are done
    assert {name: [facts["setting"] for facts in each] for name, each in found.ready.items()} == {
        name: ["one", "two"] for name in "abc"
    }
    assert not found.late and not found.failed and world.now == pytest.approx(6)


def test_several_are_prepared_at_once(world: World) -> None:
    seats = [Stand(world, name, (10.0, ready("one"))) for name in "abcd"]
    prepare.prepare(seats, world.budget(100), 2, world.say)
    assert 20 <= world.now < 21


def test_who_is_not_ready_in_time_is_stopped_and_named(world: World) -> None:
    quick = Stand(world, "quick", (1.0, ready("one")), (NEVER, ()))
    slow, behind = Stand(world, "slow", (NEVER, ())), Stand(world, "behind", (1.0, ready("one")))
    found = prepare.prepare([quick, slow, behind], world.budget(100), 1, world.say)
    assert [len(found.ready[name]) for name in ("quick", "slow", "behind")] == [1, 0, 0]
    assert found.late == {
        "quick": "has more settings, not prepared in 1:00",
        "slow": "was not ready after 1:00, at: exporting",
        "behind": "did not get its turn to be prepared in 1:00",
    }
    assert world.now <= 60 + 2 * prepare.TICK and not slow.ended  # it may still be asked: it stopped when told


def test_what_was_ready_before_is_kept_when_the_next_is_interrupted(world: World) -> None:
    seat = Stand(world, "a", (1.0, ready("eager")), (NEVER, ()))
    found = prepare.prepare([seat], world.budget(10), 1, world.say)
    assert [each["setting"] for each in found.ready["a"]] == ["eager"] and not seat.ended
    assert found.late["a"] == "was not ready after 0:06, at: exporting"


def test_who_does_not_hear_the_interrupt_is_ended_and_its_settings_with_it(world: World) -> None:
    seat = Stand(world, "a", (1.0, ready("one")), (NEVER, ()), deaf=True)
    found = prepare.prepare([seat], world.budget(100), 1, world.say)
    assert seat.ended and found.ready["a"] == [] and "was not ready" in found.late["a"]
    assert world.now <= 100 * (prepare.SHARE + prepare.GRACE) + 2 * prepare.TICK


@pytest.mark.parametrize(("how", "kept"), [("failed", ["eager"]), ("ended", [])])
def test_a_peer_that_fails_is_named_and_the_others_go_on(world: World, how: str, kept: list[str]) -> None:
    """What it had ready can still be measured, if its process is there."""
    broken = Stand(world, "broken", (1.0, ready("eager")), (1.0, (how, "RuntimeError: no compiler")))
    good = Stand(world, "good", (1.0, ready("one")), (1.0, ready("two")))
    found = prepare.prepare([broken, good], world.budget(100), 1, world.say)
    assert found.failed == {"broken": "RuntimeError: no compiler"}
    assert [each["setting"] for each in found.ready["broken"]] == kept
    assert len(found.ready["good"]) == 2 and not found.late


def test_the_progress_says_what_runs_and_how_much_is_left(world: World) -> None:
    seats = [Stand(world, "first", (10.0, ready("one"))), Stand(world, "second", (40.0, ready("one")))]
    prepare.prepare(seats, world.budget(100), 2, world.say)
    texts = [what for what, _, _ in world.told]
    assert "1:30 left, 0 of 2 peers ready; preparing first (exporting) and second (exporting)" in texts
    assert "1:05 left, 1 of 2 peers ready; preparing second (exporting)" in texts
    assert all(0 <= done <= total == 100 for _, done, total in world.told)
