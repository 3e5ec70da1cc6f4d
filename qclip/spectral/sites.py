"""Which weights are looked at, and what a site multiplies with."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qclip.errors import InputError, NonFiniteError, nearest
from qclip.models.tower import Site, Tower


def choose_sites(towers: Mapping[str, Tower], sites: str | Sequence[str] | None) -> list[tuple[Tower, Site]]:
    """Sites by name or pattern (`fnmatch`); None = all but embeddings. Raises InputError where a pattern fits none."""
    everything = [(tower, site) for tower in towers.values() for site in tower]
    if sites is None:
        return [(tower, site) for tower, site in everything if site.kind != "embedding"]
    patterns = [sites] if isinstance(sites, str) else list(sites)
    names = [site.name for _, site in everything]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"no site is named {pattern!r}; {nearest(pattern, names)}")
    return [(t, site) for t, site in everything if any(fnmatch.fnmatchcase(site.name, p) for p in patterns)]


def effective_weight(tower: Tower, site: Site) -> Tensor:
    """What the site multiplies with, float64 `[N, K]`: dequantized where it is quantized. Raises NonFiniteError."""
    quantized = getattr(site.module, "dequantized_weight", None)
    weight = (tower.weight(site) if quantized is None else quantized()).detach().double().cpu()
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"the weight of {site.name} holds NaN or Inf; check the checkpoint")
    return weight


def other_weight(towers: Mapping[str, Tower], site: Site, model: str, shape: torch.Size) -> Tensor:
    """`effective_weight` of the same site in another model. Raises InputError where it is missing or of another
    shape."""
    tower = towers.get(site.tower)
    if tower is None or site.name not in tower.sites:
        raise InputError(f"model {model!r} has no site {site.name}; compare models of one architecture")
    weight = effective_weight(tower, tower.sites[site.name])
    if weight.shape != shape:
        raise InputError(
            f"{site.name} is {tuple(weight.shape)} in model {model!r} and {tuple(shape)} in the float model; "
            "compare models of one architecture"
        )
    return weight


def steps_of(towers: Mapping[str, Tower], site: Site) -> Callable[[Tensor], Tensor] | None:
    """How units of the real steps become what they add to the weight; None where the layer tells no steps."""
    found = getattr(towers[site.tower].sites[site.name].module, "from_steps", None)
    return None if found is None else found()
