"""Widths for sites under a size budget: of every site one choice, least damage in all, no larger in all than allowed.

The multiple-choice knapsack, solved by dynamic programming over (site, size used so far): RaanA's AllocateBits (arXiv
2504.03717), and the same for damages that were measured. Damages add up; where they do not (2 bits and fewer), a
caller measures its choices again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RecipeError

STEPS = 1 << 16  # sizes of a table; a budget of more units than this is divided into so many


class InfeasibleError(RecipeError):
    """No choices are as small as the budget; `least` is what the smallest ones need."""

    def __init__(self, budget: int, least: int) -> None:
        super().__init__(f"a budget of {budget} cannot be met; the nearest that can is {least}")
        self.budget, self.least = budget, least


@dataclass(frozen=True)
class Choice:
    """One way to treat a site: how large it is then (a whole number of any unit), and what that costs."""

    size: int
    damage: float

    def __post_init__(self) -> None:
        if self.size < 0 or not math.isfinite(self.damage):
            raise ValueError(f"a choice has a size of 0 or more and a finite damage, not {self.size}, {self.damage}")


def allocate(sites: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Which choice of each site: the indices that make the summed damage least while the summed size stays within
    `budget`; of equally good ones those of least size.

    Exact where `budget`, beyond what the smallest choices need, has at most `STEPS` units of the sizes' greatest common
    divisor. Beyond that sizes are rounded up to 1/`STEPS` of it: what comes out still fits. Raises InfeasibleError
    where even the smallest choices are too large, ValueError for a site without choices.
    """
    if not all(sites):
        raise ValueError("every site needs a choice")
    least = [min(choice.size for choice in site) for site in sites]
    if (room := budget - sum(least)) < 0:
        raise InfeasibleError(budget, sum(least))
    extra = [[choice.size - smallest for choice in site] for site, smallest in zip(sites, least, strict=True)]
    room = min(room, sum(map(max, extra)))
    unit = math.gcd(*(size for site in extra for size in site)) or 1
    unit *= math.ceil((room // unit) / STEPS) or 1
    used = [[-(-size // unit) for size in site] for site in extra]
    return _least_damage(used, [[choice.damage for choice in site] for site in sites], room // unit)


def _least_damage(sizes: list[list[int]], damages: list[list[float]], room: int) -> list[int]:
    """The same for small sizes, of which each site has one of 0."""
    best = np.zeros(room + 1)  # by what may be used: the least damage of the sites so far, which it never rises with
    taken = []  # by site: which choice that is
    for size, damage in zip(sizes, damages, strict=True):
        found, which = np.full(room + 1, np.inf), np.zeros(room + 1, np.int16)
        for index in sorted(range(len(size)), key=size.__getitem__):
            if size[index] > room:
                break
            with_it = best[: room + 1 - size[index]] + damage[index]
            better = with_it < found[size[index] :]
            found[size[index] :][better] = with_it[better]
            which[size[index] :][better] = index
        taken.append(which)
        best = found
    left = int(np.argmax(best <= best[-1]))  # the first, hence the smallest, that is as good
    choices = []
    for which, size in zip(reversed(taken), reversed(sizes), strict=True):
        choices.append(int(which[left]))
        left -= size[choices[-1]]
    return choices[::-1]
