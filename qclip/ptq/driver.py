"""Runs a recipe's methods on a float model in explicit form: each in turn, block by block.

The driver owns what a method works on: the plan of every site, the samples, the inputs of a block (`BlockRun`), the
float modules that stand in the tower again when a method is done.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import calibration, rewrite
from ..errors import RecipeError
from ..layers import QuantizedPatch
from ..models.tower import Block, Site, Tower
from ..recipes import METHODS, Recipe
from .base import Context, Method, SiteState, build
from .blocks import Call, first, walk
from .moments import Moments, Sums


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
    check(context)  # a method at the end would refuse after hours
    for step, (name, options) in enumerate(context.recipe.steps):
        method: Method = METHODS.get(name)(options)
        before = {site: _decided(state) for site, state in context.states.items()}
        method.check(context)  # again: steps before it may have given sites other plans
        method.prepare(context)
        if type(method).block is not Method.block:
            if context.kept is not None:
                context.kept.begin(step, context.states)
            _blocks(context, method)
        method.finish(context)
        for site, state in context.states.items():
            _forget_old_range(state, before[site]["input"])
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


def check(context: Context) -> None:
    """Ask every method. Raises RecipeError."""
    for name, options in context.recipe.steps:
        METHODS.get(name)(options).check(context)


def _decided(state: SiteState) -> dict[str, list]:
    """By `recipes.DECIDES`: the objects that a method replaces when it decides them."""
    return {"input": [*state.transforms, state.input_scale, state.input_zero], "weight": [state.weight, state.branch]}


def _forget_old_range(state: SiteState, before: list) -> None:
    """A static range that an earlier step found is of the input as it was: where the step has changed that input and
    found none itself, one is found in the end. `before`: `_decided(state)["input"]` before the step."""
    *transforms, scale, _ = before
    if state.input_scale is not None and state.input_scale is scale:
        if [*map(id, state.transforms)] != [*map(id, transforms)]:
            state.input_scale = state.input_zero = state.negative_step = None


def _blocks(context: Context, method: Method) -> None:
    if "inputs" not in method.needs:
        raise RecipeError(f"method {method.name!r} works on blocks, so its `needs` must name 'inputs'")
    samples = context.need_samples().first(method.samples)
    towers = [tower for tower in context.towers.values() if any(site.name in context.states for site in tower)]
    endings = {tower.name: _ending(context, tower) for tower in towers}
    done, total = 0, sum(len(tower.blocks) + (endings[tower.name] is not None) for tower in towers)
    context.report(method.stage or method.name, done, total)
    try:
        for tower in towers:
            if method.inputs == "quantized":
                inside = {id(module) for block in tower.blocks for module in block.module.modules()}
                _write(context, tower, [s for s in tower if id(s.module) not in inside and s.kind != "projection"])
            for block, calls in walk(tower, context.encoders, samples, endings[tower.name]):
                run = BlockRun(context, tower, block, calls)
                _block(context, method, run)
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


def _block(context: Context, method: Method, run: BlockRun) -> None:
    """What the method does to a block, or did to it before the run was killed."""
    kept = context.kept if method.resumes else None
    states = {state.site.name: state for state in run.states.values()}
    if kept is not None and kept.find(run.block.name, states, context.notes):
        return
    method.block(context, run)
    run.restore()
    if kept is not None:
        kept.keep(run.block.name, states, context.notes)


def _ending(context: Context, tower: Tower) -> Block | None:
    """What a tower quantizes behind its blocks, its projection, as a block: None where that is nothing."""
    sites = {s.name: s for s in tower if s.kind == "projection" and s.name in context.states}
    return Block(f"{tower.name}.ending", tower.module, None, None, None, None, sites) if sites else None


def _write(context: Context, tower: Tower, sites: list[Site]) -> None:
    """Put the layers of the sites' states, ready to run, into the tower."""
    for site in sites:
        if site.name in context.states:
            layer = build(context.states[site.name])
            rewrite.pack(layer)  # the kernels read packed weights
            tower.write(site, layer)


def _show_counted(see: calibration.See, x: Tensor, call: Call) -> None:
    see(calibration.reaching(x, call.positions))


class _SeenError(Exception):
    """What was to be seen of a block has been seen."""


class BlockRun:
    """One block and what it is called with: a method's view of it. Sites are those that the recipe quantizes."""

    def __init__(self, context: Context, tower: Tower, block: Block, inputs: list[Call]) -> None:
        self.tower, self.block, self.inputs = tower, block, inputs
        self._context = context
        self.states = {
            kind: context.states[site.name] for kind, site in block.sites.items() if site.name in context.states
        }
        self._moments: dict[str, Moments | None] = {}

    @property
    def sites(self) -> list[Site]:
        return [state.site for state in self.states.values()]

    def use(self, sites: list[Site]) -> None:
        """Put layers of the states that these sites have now into the block: real quantizers, in place."""
        _write(self._context, self.tower, sites)
        self._moments.clear()

    def restore(self) -> None:
        """The float modules again."""
        self._moments.clear()
        for state in self.states.values():
            self.tower.write(state.site, state.source)

    @functools.cached_property
    def wanted(self) -> list[Tensor]:
        """The float block's outputs for the inputs."""
        there = [state.site.module for state in self.states.values()]
        self.restore()
        outputs = [first(call.run(self.block.module)) for call in self.inputs]
        for state, module in zip(self.states.values(), there, strict=True):
            self.tower.write(state.site, module)
        return outputs

    def error(self) -> float:
        """Squared error of the block's output as it stands to that of the float block, summed over what counts."""
        total = 0.0
        for call, want in zip(self.inputs, self.wanted, strict=True):
            off = first(call.run(self.block.module)).float() - want.float()
            total += float(calibration.reaching(off, call.positions).square().sum())
        return total

    def observe(self, see: dict[str, calibration.See]) -> None:
        """Show the inputs of sites (by `site.shared`), as they come, while the block runs once."""
        self._watch({key: functools.partial(_show_counted, of) for key, of in see.items()})

    def _watch(self, see: dict[str, Callable[[Tensor, Call], None]]) -> None:
        """As `observe`, with all positions and the call beside them. The block runs as far as it must."""
        to_see: set[str] = set()

        def show(x: Tensor, key: str) -> None:
            see[key](x, call)
            to_see.discard(key)
            if not to_see:
                raise _SeenError

        watched = {site.shared: site for site in reversed(self.sites) if site.shared in see}
        with calibration.Hooks() as hooks:
            for key, site in watched.items():
                hooks.add(site.module, functools.partial(show, key=key))
            for call in self.inputs:
                to_see |= watched.keys()
                with contextlib.suppress(_SeenError):
                    call.run(self.block.module)

    def moments(self, site: Site) -> Moments | None:
        """Of the site's inputs while the block stands as it does; None where no sample reaches it."""
        if site.shared not in self._moments:
            sums, mixed = Sums(self._context.states[site.name]), self._mixed()

            def add(x: Tensor, call: Call) -> None:
                counted = calibration.reaching(x, call.positions).flatten(0, -2)
                read = None
                if call.read is not None and site.shared not in mixed and x.shape[:2] == call.read.shape:
                    read = calibration.reaching(call.read[..., None], call.positions).flatten()
                sums.add(counted, read)

            self._watch({site.shared: add})
            self._moments[site.shared] = sums.moments()
        return self._moments[site.shared]

    def rows(self, count: int, shared: set[str] | None = None) -> dict[str, Tensor]:
        """Inputs of sites, by `site.shared` (None: of all), as they come: about `count` of them, float32 `[n, K]`,
        evenly from all calls, the same ones each time; where only a few rows are read, of those."""
        mixed, found = self._mixed(), dict[str, list[Tensor]]()
        each = max(1, count // max(1, len(self.inputs)))

        def take(x: Tensor, call: Call, key: str) -> None:
            read = call.read if call.read is not None and key not in mixed else call.positions
            part = calibration.reaching(x, read).flatten(0, -2)
            at = torch.linspace(0, len(part) - 1, min(each, len(part)), device=x.device).round().long()
            found.setdefault(key, []).append(part[at].float())

        keys = {site.shared for site in self.sites} if shared is None else shared
        self._watch({key: functools.partial(take, key=key) for key in keys})
        return {key: torch.cat(parts) for key, parts in found.items()}

    def _mixed(self) -> set[str]:
        """Inputs of which every position reaches every output of the block: those of keys and values."""
        return {s.site.shared for kind, s in self.states.items() if kind in ("k", "v", "pool_k", "pool_v")}

    def hessian(self, site: Site) -> Tensor:
        """`2/n sum x xT` over the n inputs x of the site, as its weight multiplies them, behind transforms and
        quantizer: float32 `[K, K]`."""
        moments = self.moments(site)
        width = self._context.states[site.name].float_weight().shape[1]
        return torch.zeros(width, width) if moments is None else moments.hessian
