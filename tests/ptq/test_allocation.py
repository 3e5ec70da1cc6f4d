"""Widths under a budget against exhaustive search."""

from __future__ import annotations

import itertools
import random

import pytest

from qclip.errors import RecipeError
from qclip.ptq import allocation
from qclip.ptq.allocation import Choice, InfeasibleError, allocate

Sites = list[list[Choice]]


def total(sites: Sites, chosen: tuple[int, ...] | list[int]) -> tuple[float, int]:
    picked = [site[i] for site, i in zip(sites, chosen, strict=True)]
    return sum(choice.damage for choice in picked), sum(choice.size for choice in picked)


def exhaustive(sites: Sites, budget: int) -> tuple[float, int]:
    """Least damage, then least size, of all combinations that fit."""
    every = (total(sites, chosen) for chosen in itertools.product(*(range(len(site)) for site in sites)))
    return min(found for found in every if found[1] <= budget)


def six_layers(seed: int, weights: tuple[int, ...] = (64, 64, 128, 192, 256, 64)) -> Sites:
    """Of four widths each; damages in quarters, so that sums are exact and ties happen."""
    rng = random.Random(seed)
    return [
        [
            Choice(bits * m, damage / 4)
            for bits, damage in zip((2, 3, 4, 8), sorted(rng.choices(range(40), k=4))[::-1], strict=True)
        ]
        for m in weights
    ]


@pytest.mark.parametrize("seed", range(4))
def test_equals_exhaustive_search(seed: int) -> None:
    sites = six_layers(seed)
    weights = sum(site[0].size for site in sites) // 2
    for bits in (2, 2.3, 3, 3.3, 4, 5.01, 8, 20):
        assert total(sites, allocate(sites, int(bits * weights))) == exhaustive(sites, int(bits * weights)), bits


def test_choices_in_any_order_and_damage_that_grows_with_size() -> None:
    sites = [[Choice(8, 1.0), Choice(2, 3.0), Choice(4, 5.0)], [Choice(3, -2.0), Choice(1, 0.0), Choice(9, 4.0)]]
    for budget in range(3, 18):
        assert total(sites, allocate(sites, budget)) == exhaustive(sites, budget), budget


def test_is_monotone_in_the_budget_and_never_worse_than_uniform_widths() -> None:
    sites = six_layers(9)
    weights, before = sum(site[0].size for site in sites) // 2, float("inf")
    for budget in range(2 * weights, 9 * weights, 64):
        damage, size = total(sites, allocate(sites, budget))
        assert damage <= before and size <= budget
        before = damage
    for index, bits in enumerate((2, 3, 4, 8)):
        uniform, _ = total(sites, [index] * 6)
        assert total(sites, allocate(sites, bits * weights))[0] <= uniform


def test_an_infeasible_budget_names_the_nearest() -> None:
    sites = six_layers(0)
    least = sum(site[0].size for site in sites)
    with pytest.raises(InfeasibleError, match=f"{least - 1} cannot be met; the nearest that can is {least}") as raised:
        allocate(sites, least - 1)
    assert raised.value.least == least and isinstance(raised.value, RecipeError)
    assert total(sites, allocate(sites, least))[1] == least
    assert allocate([], 0) == []


def test_sizes_are_divided_by_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    sites, seen = six_layers(1), []
    inner = allocation._least_damage
    monkeypatch.setattr(allocation, "_least_damage", lambda *given: seen.append(given[2]) or inner(*given))
    large = [[Choice(choice.size * 7919 + 13, choice.damage) for choice in site] for site in sites]
    budget = 3 * sum(site[0].size for site in sites) // 2
    assert allocate(large, budget * 7919 + 6 * 13) == allocate(sites, budget)
    assert seen[0] == seen[1] < 50


def test_sizes_without_a_common_unit_still_fit_and_lose_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "STEPS", 1000)
    sites = six_layers(2, (64_007, 64_013, 128_021, 192_029, 256_033, 64_037))
    for bits in (2.1, 2.7, 3.5, 5):
        budget = int(bits * sum(site[0].size for site in sites) / 2)
        damage, size = total(sites, allocate(sites, budget))
        assert size <= budget and damage <= exhaustive(sites, int(budget * 0.997))[0]


def test_refuses_what_is_no_choice() -> None:
    with pytest.raises(ValueError, match="every site needs a choice"):
        allocate([[Choice(1, 0.0)], []], 5)
    for size, damage in ((-1, 0.0), (1, float("nan")), (1, float("inf"))):
        with pytest.raises(ValueError, match="a size of 0 or more and a finite damage"):
            Choice(size, damage)
