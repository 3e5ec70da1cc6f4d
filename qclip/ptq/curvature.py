"""How much an error of a site's output matters: squared gradients, which stand for the diagonal of a Hessian.

A loss that compares the model with its own float output has no gradient where they are equal, which is where methods
look. So the gradient is that of `<e, r>`, e the unit embedding and r drawn from N(0, I): over draws of r the mean of
its square is the diagonal of JᵀJ, the Hessian of half the squared distance of embeddings (docs/methods.md, PTQ4ViT).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import calibration
from ..calibration import Samples
from ..models.tower import Site
from .base import Context


@dataclasses.dataclass
class Curvature:
    """Of some positions, the same for all sites that share an input."""

    inputs: dict[str, Tensor]  # by `site.shared`: float32 [n, K], as they come
    squares: dict[str, Tensor]  # by site name: float32 [n, N], squared gradients by the site's output


class _Seen:
    """One batch: inputs and outputs of sites."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def watch(self, site: Site) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
        """A forward hook."""

        def see(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            self.inputs[site.shared], self.outputs[site.name] = args[0].detach(), output
            return output

        return see


def curvature(context: Context, samples: Samples, sites: list[Site], rows: int, seed: int = 0) -> Curvature:
    """At most about `rows` positions of every site, drawn evenly from the batches; of captions only those that reach
    their embeddings. Sites that no sample reaches are left out."""
    random = torch.Generator().manual_seed(seed)
    inputs: dict[str, list[Tensor]] = {}
    squares: dict[str, list[Tensor]] = {}
    for tower in context.towers.values():
        here = [site for site in sites if site.tower == tower.name]
        batches = list(calibration.batches(context.encoders, samples, tower.name)) if here else []
        for done, batch in enumerate(batches):
            context.report(f"gradients, {tower.name}", done, len(batches))
            seen = _Seen()
            handles = [site.module.register_forward_hook(seen.watch(site)) for site in here]
            try:
                with torch.enable_grad():
                    unit = F.normalize(batch.encode(batch.inputs).float(), dim=-1)
                    wanted = torch.randn(unit.shape, generator=random).to(unit.device)
                    names = list(seen.outputs)
                    grads = torch.autograd.grad((unit * wanted).sum(), list(seen.outputs.values()), allow_unused=True)
            finally:
                for handle in handles:
                    handle.remove()
            found = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
            drawn: dict[str, Tensor] = {}
            for site in here:
                if site.name not in found:
                    continue
                grad = _rows(found[site.name], batch.positions)
                if site.shared not in drawn:
                    x = _rows(seen.inputs[site.shared], batch.positions)
                    drawn[site.shared] = torch.randperm(len(x), generator=random)[: math.ceil(rows / len(batches))]
                    inputs.setdefault(site.shared, []).append(x[drawn[site.shared]])
                squares.setdefault(site.name, []).append(grad[drawn[site.shared]].square())
        context.report(f"gradients, {tower.name}", len(batches), len(batches))
    return Curvature(
        {key: torch.cat(parts) for key, parts in inputs.items()},
        {name: torch.cat(parts) for name, parts in squares.items()},
    )


def _rows(x: Tensor, positions: Tensor | None) -> Tensor:
    return calibration.reaching(x, positions).flatten(0, -2).float()
