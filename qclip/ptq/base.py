"""The interface of a post-training method: it may change a site's state; rounding comes last.

A method is one file with one class. `Context` holds the float model in explicit form, the plan of every site and the
samples; `states[name]` collects, site by site, what the methods decide. `finish` turns a state into the numbers that
a layer holds.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from qkernels import Int4Weight, Int8Weight, weights
from qkernels.grids import Grid

from .. import calibration
from ..errors import NonFiniteError, RecipeError
from ..layers import Int4Linear, Int8Linear, QuantizedEmbedding, QuantizedPatch, SimulatedLinear
from ..models import Encoders
from ..models.tower import Block, Site, Tower
from ..recipes import FLOAT, Recipe, SitePlan


@dataclasses.dataclass
class SiteState:
    """What the methods have decided for a site so far."""

    smooth: Tensor | None = None  # float32 [K]: multiplies the input; the weight is divided by it
    input_scale: Tensor | None = None  # float32 []: static scale of the (smoothed) input


@dataclasses.dataclass
class Context:
    model: nn.Module
    recipe: Recipe
    towers: dict[str, Tower]
    encoders: Encoders
    samples: calibration.Samples | None
    plans: dict[str, SitePlan]
    floats: dict[str, nn.Module]  # the float module of every site, whatever stands in its place for the moment
    states: dict[str, SiteState]
    notes: dict  # goes into the provenance: what a method chose
    progress: calibration.Progress | None = None

    def report(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)

    def weight(self, site: Site) -> Tensor:
        """The float weight, float32 `[N, K]`."""
        return self.floats[site.name].weight.detach().flatten(1).float()  # type: ignore[union-attr, operator]

    def quantized_sites(self, tower: Tower | None = None) -> list[Site]:
        towers = self.towers.values() if tower is None else [tower]
        return [site for t in towers for site in t if self.plans[site.name].state != "float"]

    def blocks(self) -> list[tuple[Tower, Block]]:
        return [(tower, block) for tower in self.towers.values() for block in tower.blocks]

    def need_samples(self) -> calibration.Samples:
        if self.samples is None:
            raise RecipeError(
                f"recipe {self.recipe.name!r} needs data: pass calibration=... (--calibration DATA on the command line)"
            )
        return self.samples


class Method:
    """One step of a recipe. `run` sees the float model and writes into `context.states`."""

    name = ""

    def run(self, context: Context) -> None:
        raise NotImplementedError


def weight_grid(plan: SitePlan) -> Grid:
    """`sym` at 5 bits and above, `symfull` below, where it is the better one (methods 2.0)."""
    return Grid(plan.weight_bits, "sym" if plan.weight_bits >= 5 else "symfull", plan.group)


def quantize_weight(weight: Tensor, plan: SitePlan) -> Int8Weight | Int4Weight:
    """Round to nearest on the plan's grid with its observer's scales."""
    grid = weight_grid(plan)
    return weights.quantize_weight(weight, grid, *grid.fit(weight, plan.weight_observer))


def build(context: Context, site: Site) -> nn.Module:
    """The module that replaces `site`, from its float weight, which is finite, and its state. Raises NonFiniteError
    naming the site where no scale can hold its numbers."""
    plan, state = context.plans[site.name], context.states[site.name]
    source = context.floats[site.name]
    weight, bias = context.weight(site), getattr(source, "bias", None)
    dtype: torch.dtype = source.weight.dtype  # type: ignore[union-attr, assignment]
    bias = None if bias is None else bias.detach()
    if site.kind == "embedding":
        return QuantizedEmbedding(Int8Weight.quantize(weight), dtype=dtype)
    if state.smooth is not None:
        weight = weight / state.smooth
    try:
        quantized = quantize_weight(weight, plan)
    except ValueError as error:  # smoothing left the range of float32, or a scale that of float16
        raise NonFiniteError(f"{site.name}: {error}") from error
    module: nn.Module
    if plan.state == "simulated":
        module = SimulatedLinear(quantized, bias, plan.activation_bits, state.smooth, state.input_scale, dtype)
    elif isinstance(quantized, Int4Weight):
        module = Int4Linear(quantized, bias, state.smooth, state.input_scale, dtype)
        module.float_input = plan.activation_bits == FLOAT
    else:
        module = Int8Linear(quantized, bias, state.smooth, state.input_scale, dtype)
    if isinstance(source, nn.Conv2d):
        return QuantizedPatch(module, tuple(source.kernel_size))  # type: ignore[arg-type]
    return module
