"""What a post-training method is, and what it works on.

A method is one file with one class. It changes the *states* of sites: how their inputs are transformed, which scales
and codes they get. `build` then makes a layer of a state, by rounding to nearest what no method has decided. The driver
(`driver.py`) owns the order: every method in turn, `prepare` once, then `block` for every block of every tower.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qkernels import Int4Weight, Int8Weight, weights
from qkernels.weights import Weight

from .. import calibration
from ..errors import NonFiniteError
from ..layers import (
    AttentionOperands,
    Branch,
    Int4Linear,
    Int8Linear,
    QuantizedEmbedding,
    QuantizedPatch,
    QuantizedSite,
    SimulatedLinear,
)
from ..layers.transforms import Transform, folded, transformed
from ..models import Encoders
from ..models.tower import Site, Tower
from ..recipes import FLOAT, Recipe, Treatment

if typing.TYPE_CHECKING:
    from .driver import BlockRun
    from .resume import Resumption


@dataclasses.dataclass
class SiteState:
    """What is decided of a site so far; all that `build` needs."""

    site: Site
    source: nn.Module  # the float module, whatever stands in its place for the moment
    plan: Treatment  # what the recipe wants; a method may replace it
    transforms: list[Transform] = dataclasses.field(default_factory=list)  # shared by sites of one `site.shared`
    input_scale: Tensor | None = None  # float32 []: static scale of the transformed input
    input_zero: Tensor | None = None  # int32 []: zero point of the static codes; None: 0
    negative_step: float | None = None  # of a static twin input, which is simulated: its step below 0
    input_share: float | None = None  # of each token's range that dynamic codes cover, simulated; None: all of it
    branch: Branch | None = None  # of the transformed input: what it adds, the codes need not stand for
    weight: Weight | None = None  # of the transformed input, on the plan's grid; None: round to nearest
    bias: Tensor | None = None  # float [N], in place of the float module's own

    def float_weight(self) -> Tensor:
        """Float32 `[N, K]`, to the input as it comes."""
        return self.source.weight.detach().flatten(1).float()  # type: ignore[union-attr, operator]

    def float_bias(self) -> Tensor | None:
        bias = getattr(self.source, "bias", None) if self.bias is None else self.bias
        return None if bias is None else bias.detach()

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight float32 `[N, K]` and bias to the transformed input: without what the branch adds."""
        weight, bias = folded(self.float_weight(), self.float_bias(), self.transforms)
        return (weight if self.branch is None else weight - self.branch.weight()), bias

    def input(self, x: Tensor) -> Tensor:
        """The transformed input, which is what gets quantized."""
        return transformed(x, self.transforms)

    @property
    def scalable(self) -> bool:
        """Whether its input channels may be scaled. Nothing can be folded through GELU into fc1, but a scale stays with
        fc2, so it needs no folding. Beside a static scale it is not: units that hardly fire on the calibration images,
        made large, are clipped where they do fire on others (`photos`, calibrated on other images than those of the
        test: six times as far from float)."""
        site = self.site
        return site.kind != "embedding" and (site.smoothable or (site.kind == "fc2" and not self.plan.static))


@dataclasses.dataclass
class Context:
    """The float model in explicit form, with the state of every site that the recipe does not leave float."""

    model: nn.Module
    recipe: Recipe
    towers: dict[str, Tower]
    encoders: Encoders
    samples: calibration.Samples | None
    states: dict[str, SiteState]  # by site name
    notes: dict  # goes into the provenance: what a method chose
    progress: calibration.Progress | None = None
    seed: int = 0  # of everything random
    kept: Resumption | None = None  # what a killed run goes on from
    provenance: dict = dataclasses.field(default_factory=dict)  # what the model is made of, and with

    def plan(self, name: str) -> Treatment | None:
        """What is wanted of a site; None: it stays float."""
        return self.states[name].plan if name in self.states else None

    def report(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)

    def need_samples(self) -> calibration.Samples:
        """The calibration samples. A method that asks for them names "inputs" in its `needs`."""
        assert self.samples is not None, "the recipe's `needs_data` said that no method needs samples"
        return self.samples

    def channel_maxima(self, sites: list[Site]) -> dict[str, Tensor]:
        """Largest |transformed input| per channel, float32 `[K]`, by `site.shared`; a pass over all samples."""
        return calibration.channel_maxima(
            self.encoders, self.towers, self.need_samples(), sites, self._inputs(sites), self.progress
        )

    def channel_moments(self, sites: list[Site]) -> dict[str, calibration.Moments]:
        """Mean and spread of every channel of the transformed inputs, by `site.shared`; a pass over all samples."""
        return calibration.channel_moments(
            self.encoders, self.towers, self.need_samples(), sites, self._inputs(sites), self.progress
        )

    def static_quantizers(self, sites: list[Site]) -> dict[str, calibration.Quantizer]:
        """Static scales and zero points of the transformed inputs, by the observers of the sites' plans, by site name;
        a pass over all samples."""
        plans = {site.name: self.states[site.name].plan for site in sites}
        return calibration.static_quantizers(
            self.encoders, self.towers, self.need_samples(), sites, plans, self._inputs(sites), self.progress
        )

    def attention_operands(self) -> dict[str, AttentionOperands]:
        """The quantizers inside attention that the recipe wants, by block name; a pass over all samples."""
        blocks = (block for tower in self.towers.values() for block in tower.blocks)
        wanted = {block.name: self.recipe.attention_plan(f"{block.name}.attn.scores") for block in blocks}
        found = {name: plan for name, plan in wanted.items() if plan is not None}
        if not found:
            return {}
        return calibration.attention_operands(self.encoders, self.towers, self.need_samples(), found, self.progress)

    def _inputs(self, sites: list[Site]) -> dict[str, typing.Callable[[Tensor], Tensor]]:
        return {site.shared: self.states[site.name].input for site in sites}


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Of a method that has none."""


class Method:
    """One step of a recipe. Register a subclass with `recipes.METHODS`, or name it in an entry point "qclip.methods".

    `options`: a frozen dataclass, which is the JSON of the method's options in a recipe (`typed.from_dict` says which
    types its fields may have); a ValueError of it refuses values. `__init__` computes nothing: recipes make methods to
    ask them what they decide.
    """

    name: ClassVar[str]
    options: ClassVar[type] = NoOptions
    needs: ClassVar[frozenset[str]] = frozenset()  # of recipes.NEEDS
    decides: frozenset[str] = frozenset()  # of recipes.DECIDES; may depend on the options
    leaves: ClassVar[frozenset[str]] = frozenset()  # of `decides`: what a later step that decides it does instead
    inputs: ClassVar[Literal["float", "quantized"]] = "float"  # what `block` sees: behind float or quantized blocks
    stage: ClassVar[str] = ""  # for progress: what `block` does; the name without it
    samples: int | None = None  # images, or captions, that `block` sees; None: all
    resumes: ClassVar[bool] = False  # whether all that `block` finds is in the block's states and in `context.notes`

    def __init__(self, options: Any) -> None:
        self.chosen = options

    def side_bits(self, plan: Treatment, n: int, k: int) -> int:
        """Bits that it may store of a site with a weight `[n, k]` beside the codes and scales of `plan`, at most:
        transforms, zeros, a branch. A size budget counts them."""
        return 0

    def check(self, context: Context) -> None:
        """Raises RecipeError for what it cannot do with this recipe's sites, whatever the samples. It computes nothing:
        a study asks it before anything runs, the driver again before `prepare`."""

    def prepare(self, context: Context) -> None:
        """Once, before the blocks: statistics, an equal float model, other plans for sites."""

    def block(self, context: Context, run: BlockRun) -> None:
        """For every block, in the order in which they run. Whatever it writes into the tower is taken out again."""

    def finish(self, context: Context) -> None:
        """Once, after the blocks."""


def quantize_weight(weight: Tensor, plan: Treatment) -> Weight:
    """Round to nearest on the plan's grid with its observer's scales."""
    return weights.quantize_weight(weight, plan.grid, *weight_scales(weight, plan))


def weight_scales(weight: Tensor, plan: Treatment) -> tuple[Tensor, Tensor | None]:
    """Scales, and zeros where the grid has them, of float `[N, K]` by the plan's observer: float32 `[N, groups]`."""
    if plan.weight_scale == "channel":
        return plan.grid.fit(weight, plan.weight_observer)
    scales, zeros = plan.grid.fit(weight.reshape(1, -1), plan.weight_observer)
    return scales.expand(len(weight), 1), None if zeros is None else zeros.expand(len(weight), 1)


def build(state: SiteState) -> nn.Module:
    """The layer that replaces a site, from its state alone. Raises NonFiniteError naming the site where no scale can
    hold its numbers."""
    source, plan = state.source, state.plan
    weight, bias = state.folded()
    try:
        quantized = quantize_weight(weight, plan) if state.weight is None else state.weight
    except ValueError as error:  # a transform left the range of float32, or a scale that of float16
        raise NonFiniteError(f"{state.site.name}: {error}") from error
    bits = None if plan.activation_bits == FLOAT else plan.activation_bits
    dtype: torch.dtype = source.weight.dtype  # type: ignore[union-attr, assignment]
    settings: dict[str, Any] = {
        "transforms": state.transforms,
        "input_scale": state.input_scale,
        "input_zero": state.input_zero,
        "dtype": dtype,
        "grid": plan.grid,
        "branch": state.branch,
    }
    layer: QuantizedSite
    if state.site.kind == "embedding":
        return QuantizedEmbedding(quantized, dtype=dtype, grid=plan.grid)
    # Codes of 1 to 8 bits per channel fit the INT8 product; float inputs have a kernel beside 4-bit weights only, and
    # a zero point has one where it is static.
    runs = (plan.activation_grid == "sym" or plan.static) and state.negative_step is None and state.input_share is None
    if isinstance(quantized, Int4Weight) and bits in (8, None) and runs:
        layer = Int4Linear(quantized, bias, **settings, float_input=bits is None)
    elif isinstance(quantized, Int8Weight) and bits == 8 and runs:
        layer = Int8Linear(quantized, bias, **settings)
    else:
        grid = plan.activation_grid
        rest: dict[str, Any] = {
            "activation_grid": grid,
            "negative_step": state.negative_step,
            "input_share": state.input_share or 1.0,
        }
        layer = SimulatedLinear(quantized, bias, **settings, activation_bits=bits, **rest)
    if isinstance(source, nn.Conv2d):
        return QuantizedPatch(layer, tuple(source.kernel_size))  # type: ignore[arg-type]
    return layer
