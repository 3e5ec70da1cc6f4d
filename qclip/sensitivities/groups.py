"""The sites that are quantized together, because they read one quantized input: q, k and v; and what they weigh."""

from __future__ import annotations

import dataclasses

from qkernels.grids import Grid

from ..models.tower import Site, Tower
from ..recipes import Recipe, Treatment

FIXED = ("patch", "embedding")  # kinds whose width a recipe's name does not choose


@dataclasses.dataclass(frozen=True)
class Group:
    """`name`: what its sites share (`Site.shared`)."""

    name: str
    tower: str
    sites: tuple[Site, ...]

    def bits(self, treatment: Treatment) -> int:
        """Bits that the group's weights take on disk: codes, scales and zeros."""
        return sum(stored_bits(treatment.grid, *_shape(site)) for site in self.sites)

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


def stored_bits(grid: Grid, n: int, k: int) -> int:
    """Of a weight `[n, k]` in an artifact: its codes without empty bits, float32 scales of channels or float16 scales
    of groups, and as many zeros where the grid has some."""
    if grid.container == "Int8Weight":
        return n * (k * grid.bits + 32)
    count = n * (1 if grid.group is None else -(-k // grid.group))
    return n * k * grid.bits + 16 * count * (2 if grid.kind in ("asym", "floatzero", "midrise") else 1)


def _shape(site: Site) -> tuple[int, int]:
    weight = site.module.weight.flatten(1)  # type: ignore[union-attr, operator]
    return int(weight.shape[0]), int(weight.shape[1])
