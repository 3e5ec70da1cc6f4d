"""Which shapes get programs: by counts alone, so that the same calls always lead to the same."""

import random
from typing import Any

import pytest

from qclip.models import admission
from qclip.models.admission import AGE, OFTEN, PROOF, TRIED, Costs, Counts, Shelf
from qkernels.recording import NoRoomError

FREE = Costs(trace=0, derive=0, record=0, credit=0)


class Room:
    """Stands for the workspace, with room for some programs."""

    def __init__(self, most: int) -> None:
        self.most, self.shelf = most, None
        self.fitted = 0

    def fit(self) -> None:
        self.fitted += 1

    def make(self) -> Any:
        if len(self.shelf.programs) >= self.most:
            raise NoRoomError("full")
        return object()


def shelf(costs: Costs = FREE, most: int = 10**9) -> tuple[Shelf, Room, Counts]:
    counts, room = Counts(), Room(most)
    room.shelf = Shelf(object(), counts, room, costs)  # type: ignore[arg-type]
    return room.shelf, room, counts


def call(found: Shelf, room: Room, key: Any, cost: int = 0) -> bool:
    """As `Programs.run` does. -> whether it was a replay"""
    entry = found.entry(key)
    if entry.program is not None:
        found.earn()
        return True
    if entry.uses >= entry.tried and found.spend(entry, cost):
        try:
            found.keep(entry, room.make)
        except NoRoomError:
            found.refuse(entry, for_good=False)
    return False


def test_a_shape_that_does_not_come_again_costs_nothing() -> None:
    found, room, _ = shelf()
    for size in range(1000):
        call(found, room, size)
    assert not found.programs
    assert len(found._entries) <= 2 * AGE, "what came once is forgotten"


def test_the_second_call_makes_a_program_and_the_third_replays() -> None:
    found, room, counts = shelf(Costs(credit=4, derive=4))
    assert [call(found, room, "a", 4) for _ in range(4)] == [False, False, True, True]
    assert counts.get()["replayed"] == 2


def test_what_replays_saved_pays_for_other_shapes() -> None:
    found, room, _ = shelf(Costs(credit=4))
    for key in "aabb":
        call(found, room, key, 4)
    assert len(found.programs) == 1, "a took the advance"
    for _ in range(3):
        call(found, room, "a", 4)
    call(found, room, "b", 4)
    assert len(found.programs) == 1, "three replays have not saved it yet"
    call(found, room, "a", 4)
    call(found, room, "b", 4)
    assert len(found.programs) == 2 and found.saved == 0
    for _ in range(100):
        call(found, room, "a", 4)
    assert found.saved == 4, "savings of long ago are no reason to spend"


def test_without_savings_a_shape_proves_by_its_own_calls_that_it_comes_again() -> None:
    found, room, _ = shelf(Costs(credit=0))
    made = [call(found, room, "a", 7) for _ in range(20)].index(True)
    assert made == PROOF * 7


def test_only_a_shape_with_many_of_the_calls_gets_its_program_in_advance() -> None:
    for others, made in ((4 * OFTEN, 0), (2 * OFTEN - 2, 1)):
        found, room, _ = shelf(Costs(credit=9))
        for number in range(others):
            call(found, room, number, 3)
        for _ in range(2):
            call(found, room, "twice", 3)
        assert len(found.programs) == made, others


def test_an_old_mix_does_not_keep_a_new_shape_from_its_program() -> None:
    found, room, _ = shelf(Costs(credit=10**6))
    for number in range(20 * AGE):
        found.entry(number)
    assert any(call(found, room, "new", 10**6) for _ in range(AGE))


def test_a_trace_is_worth_what_all_shapes_gain_by_it() -> None:
    found, room, _ = shelf(Costs(derive=3))
    for number in range(10 * (PROOF * 3 + 4)):
        found.entry(number % 10)
    assert found.worth() == 10 * 4
    lone = found.entry("lone")
    assert found.spend(lone, 40 // PROOF, found.worth()) and not found.spend(lone, 40 // PROOF + 1, found.worth())


def texts(seed: int, calls: int) -> int:
    """Calls that replays saved, less what programs cost, of prompts of 1 to 18 words, 1 to 8 at a time: some 70 shapes,
    most of them seen once or twice in 200 calls."""
    draw, costs = random.Random(seed), Costs()
    found, room, counts = shelf(costs)
    traced, spent = False, 0
    for _ in range(calls):
        batch = draw.randint(1, 8)
        entry = found.entry((batch, max(draw.randint(1, 18) for _ in range(batch))))
        if entry.program is not None:
            found.earn()
        elif entry.uses >= entry.tried:
            if not traced:
                traced = found.spend(entry, 4 * costs.trace, found.worth(2), 2)
                spent += 4 * costs.trace * traced
            if traced and found.spend(entry, costs.derive, sizes=2):
                spent += costs.derive
                found.keep(entry, room.make)
    return counts.get()["replayed"] - spent


def test_a_diffuse_mix_is_left_to_the_modules_at_first_and_pays_later() -> None:
    """What is spent stays below what 2 % of 200 calls cost, at three of ten parts of a call that a replay saves."""
    assert sum(texts(seed, 200) for seed in range(20)) / 20 >= -0.02 * 200 / 0.3
    assert all(texts(seed, 3000) > 1000 for seed in range(5))


@pytest.mark.parametrize("order", ["rotation", "random"])
def test_shapes_that_take_turns_do_not_drive_each_other_out(order: str) -> None:
    found, room, counts = shelf(most=4)
    draw = random.Random(0)
    replays = sum(
        call(found, room, number % 5 if order == "rotation" else draw.randrange(5)) for number in range(20 * AGE)
    )
    assert replays >= 0.75 * 20 * AGE
    assert counts.get()["dropped"] <= 3


def test_what_is_used_no_more_makes_room() -> None:
    found, room, counts = shelf(most=2)
    for number in range(3 * AGE):
        call(found, room, ("old", number % 2))
    replays = [call(found, room, ("new", number % 2)) for number in range(8 * AGE)]
    assert counts.get()["dropped"] == 2 and all(replays[-AGE:])
    assert room.fitted == 2, "the workspace may shrink"


def test_a_refused_shape_is_tried_again_seldom_or_never() -> None:
    found, room, counts = shelf(most=0)
    for _ in range(AGE - 1):
        call(found, room, "large")
    assert 1 < counts.get()["refused"] <= 9
    entry = found.entry("odd")
    found.refuse(entry, for_good=True)
    for _ in range(3 * AGE):
        assert found.entry("odd").uses < entry.tried


def test_as_many_graphs_as_are_allowed() -> None:
    found, room, counts = shelf()
    for key in "abcdef":
        for _ in range(TRIED):
            entry = found.entry(key)
        if len(found.programs) < 4:
            found.keep(entry, room.make, 4)
        else:
            with pytest.raises(NoRoomError, match="4 graphs"):
                found.keep(entry, room.make, 4)
    assert len(found.programs) == 4 and counts.get()["dropped"] == 0


def test_counts_add_up_to_those_of_the_process() -> None:
    before, counts = admission.TOTAL.get(), Counts(admission.TOTAL)
    for name in Counts.NAMES:
        counts.add(name)
    assert counts.get() == dict.fromkeys(Counts.NAMES, 1)
    assert admission.TOTAL.get() == {name: n + 1 for name, n in before.items()}
