"""Runs a recipe's methods on a float model in explicit form: each in turn, block by block.

The driver owns what a method works on: the plan of every site, the samples, the inputs of a block (`BlockRun`), the
float modules that stand in the tower again when a method is done.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .. import calibration, rewrite
from ..errors import RecipeError
from ..layers import QuantizedPatch
from ..models.tower import Block, Site, Tower
from ..recipes import METHODS, Recipe
from .base import Context, Method, SiteState, build
from .blocks import Call, first, walk


def states(recipe: Recipe, towers: dict[str, Tower]) -> dict[str, SiteState]:
    """The state of every site that the recipe does not leave float, by name. A convolution whose patches overlap stays
    float, too."""
    out = {}
    for tower in towers.values():
        for site in tower:
            plan = recipe.plan(site.name, site.kind)
            unfit = isinstance(site.module, nn.Conv2d) and not QuantizedPatch.fits(site.module)
            if plan is not None and not unfit:
                out[site.name] = SiteState(site, site.module, plan)
    return out


@torch.no_grad()
def decide(context: Context) -> None:
    """Run the recipe's methods, then find the static scales that none of them has. Only states change."""
    for name, options in context.recipe.steps:
        method: Method = METHODS.get(name)(options)
        before = {site: _decided(state) for site, state in context.states.items()}
        method.prepare(context)
        if type(method).block is not Method.block:
            _blocks(context, method)
        method.finish(context)
        for site, state in context.states.items():
            for what, now in _decided(state).items():
                same = [*map(id, now)] == [*map(id, before[site][what])]
                if not same and what not in method.decides:
                    raise RecipeError(
                        f"method {name!r} changed the {what} of {site}, which its `decides` does not name"
                    )
    static = [s.site for s in context.states.values() if s.plan.static and s.input_scale is None]
    if static:
        for name, found in context.static_quantizers(static).items():
            context.states[name].input_scale, context.states[name].input_zero = found


def _decided(state: SiteState) -> dict[str, list]:
    """By `recipes.DECIDES`: the objects that a method replaces when it decides them."""
    return {"input": [*state.transforms, state.input_scale, state.input_zero], "weight": [state.weight, state.branch]}


def _blocks(context: Context, method: Method) -> None:
    if "inputs" not in method.needs:
        raise RecipeError(f"method {method.name!r} works on blocks, so its `needs` must name 'inputs'")
    samples = context.need_samples().first(method.samples)
    done, total = 0, sum(len(tower.blocks) for tower in context.towers.values())
    context.report(method.stage or method.name, done, total)
    try:
        for tower in context.towers.values():
            if method.inputs == "quantized":
                inside = {id(module) for block in tower.blocks for module in block.module.modules()}
                _write(context, tower, [site for site in tower if id(site.module) not in inside])
            for block, calls in walk(tower, context.encoders, samples):
                run = BlockRun(context, tower, block, calls)
                method.block(context, run)
                run.restore()
                if method.inputs == "quantized":
                    _write(context, tower, run.sites)
                done += 1
                context.report(method.stage or method.name, done, total)
        if done < total:  # blocks that no sample reaches
            context.report(method.stage or method.name, total, total)
    finally:
        for tower in context.towers.values():
            for site in tower:
                if site.name in context.states:
                    tower.write(site, context.states[site.name].source)


def _write(context: Context, tower: Tower, sites: list[Site]) -> None:
    """Put the layers of the sites' states, ready to run, into the tower."""
    for site in sites:
        if site.name in context.states:
            layer = build(context.states[site.name])
            rewrite.pack(layer)  # the kernels read packed weights
            tower.write(site, layer)


class BlockRun:
    """One block and what it is called with: a method's view of it. Sites are those that the recipe quantizes."""

    def __init__(self, context: Context, tower: Tower, block: Block, inputs: list[Call]) -> None:
        self.tower, self.block, self.inputs = tower, block, inputs
        self._context = context
        self.states = {
            kind: context.states[site.name] for kind, site in block.sites.items() if site.name in context.states
        }
        self._hessians: dict[str, Tensor] = {}

    @property
    def sites(self) -> list[Site]:
        return [state.site for state in self.states.values()]

    def use(self, sites: list[Site]) -> None:
        """Put layers of the states that these sites have now into the block: real quantizers, in place."""
        self.wanted  # noqa: B018 - what the float block gives, while it is one
        _write(self._context, self.tower, sites)

    def restore(self) -> None:
        """The float modules again."""
        for state in self.states.values():
            self.tower.write(state.site, state.source)

    @functools.cached_property
    def wanted(self) -> list[Tensor]:
        """The float block's outputs for the inputs."""
        return [first(call.run(self.block.module)) for call in self.inputs]

    def error(self) -> float:
        """Squared error of the block's output as it stands to that of the float block, summed over what counts."""
        total = 0.0
        for call, want in zip(self.inputs, self.wanted, strict=True):
            off = first(call.run(self.block.module)).float() - want.float()
            total += float(calibration.reaching(off, call.positions).square().sum())
        return total

    def observe(self, see: dict[str, calibration.See]) -> None:
        """Show the inputs of sites (by `site.shared`), as they come, while the block runs once."""
        with calibration.Hooks() as hooks:
            for site in self.sites:
                if site.shared in see:
                    hooks.add(site.module, see.pop(site.shared))
            for call in self.inputs:
                hooks.reaching = call.positions
                call.run(self.block.module)

    def hessian(self, site: Site) -> Tensor:
        """`2/n sum x xT` over the n inputs x of the site, behind its transforms: float32 `[K, K]`."""
        if site.shared not in self._hessians:
            state = self._context.states[site.name]
            total, rows = torch.zeros(()), 0

            def add(x: Tensor) -> None:
                nonlocal total, rows
                x = state.input(x).flatten(0, -2).float()
                total, rows = total.to(x.device) + x.T @ x, rows + len(x)

            self.observe({site.shared: add})
            self._hessians[site.shared] = total * (2 / max(rows, 1))
        return self._hessians[site.shared]
