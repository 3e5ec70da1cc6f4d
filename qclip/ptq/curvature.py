"""How much an error of a site's output matters: squared gradients, which stand for the diagonal of a Hessian."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .. import calibration, seeds
from ..calibration import Batch, Samples
from ..models.tower import Site
from .base import Context


@dataclasses.dataclass
class Curvature:
    """Of some positions, the same for all sites that share an input."""

    inputs: dict[str, Tensor]  # by `site.shared`: float32 [n, K], as they come
    squares: dict[str, Tensor]  # by site name: float32 [n, N], squared gradients by the site's output


def curvature(context: Context, samples: Samples, sites: list[Site], rows: int, seed: int = 0) -> Curvature:
    """About `rows` positions of every site, drawn evenly from the batches; of captions only those that reach their
    embeddings. Sites that no sample reaches are left out. Gradients: `calibration.gradients`."""
    inputs: dict[str, list[Tensor]] = {}
    squares: dict[str, list[Tensor]] = {}
    drawn: dict[str, tuple[Batch, Tensor]] = {}  # by `site.shared`: of the batch that is being shown
    for tower in context.towers.values():
        here = [site for site in sites if site.tower == tower.name]
        if not here:
            continue
        share = rows / max(1, sum(map(len, calibration.batches(context.encoders, samples, tower.name))))
        random = torch.Generator().manual_seed(int(seeds.generator(seed, f"rows of {tower.name}").integers(1 << 62)))

        def see(site: Site, x: Tensor, gradient: Tensor, batch: Batch, share=share, random=random) -> None:
            x, gradient = _rows(x, batch), _rows(gradient, batch)
            if site.shared not in drawn or drawn[site.shared][0] is not batch:
                drawn[site.shared] = batch, torch.randperm(len(x), generator=random)[: math.ceil(share * len(batch))]
                inputs.setdefault(site.shared, []).append(x[drawn[site.shared][1]])
            squares.setdefault(site.name, []).append(gradient[drawn[site.shared][1]].square())

        calibration.gradients(context.encoders, samples, tower.name, here, see, seed, context.progress)
    return Curvature(
        {key: torch.cat(parts) for key, parts in inputs.items()},
        {name: torch.cat(parts) for name, parts in squares.items()},
    )


def _rows(x: Tensor, batch: Batch) -> Tensor:
    return calibration.reaching(x, batch.positions).flatten(0, -2)
