"""The sites that are quantized together, because they read one quantized input: q, k and v; and what they weigh."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..layers import grid_bits
from ..models.tower import Site, Tower
from ..recipes import METHODS, Recipe, Treatment

FIXED = ("patch", "embedding")  # kinds whose width a recipe's name does not choose


@dataclasses.dataclass(frozen=True)
class Group:
    """`name`: what its sites share (`Site.shared`)."""

    name: str
    tower: str
    sites: tuple[Site, ...]

    def bits(self, treatment: Treatment, steps: tuple[tuple[str, Any], ...] = ()) -> int:
        """Bits that the group's weights take on disk, at most: codes, scales and zeros, a static scale and zero point
        of the input, and what `steps` of a recipe hold beside them."""
        methods = [METHODS.get(name)(options) for name, options in steps]
        total = 0
        for site in self.sites:
            total += grid_bits(treatment.grid, *_shape(site)) + 64 * treatment.static
            total += sum(method.side_bits(treatment, *_shape(site)) for method in methods)
        return total

    @property
    def weights(self) -> int:
        return sum(n * k for n, k in map(_shape, self.sites))


def groups(towers: dict[str, Tower], recipe: Recipe) -> list[Group]:
    """Those whose width `recipe` chooses, in the order in which they run."""
    found: dict[tuple[str, str], list[Site]] = {}
    for name, tower in towers.items():
        for site in tower:
            if site.kind not in FIXED and recipe.plan(site.name, site.kind) is not None:
                found.setdefault((name, site.shared), []).append(site)
    return [Group(shared, tower, tuple(sites)) for (tower, shared), sites in found.items()]


def _shape(site: Site) -> tuple[int, int]:
    weight = site.module.weight.flatten(1)  # type: ignore[union-attr, operator]
    return int(weight.shape[0]), int(weight.shape[1])
