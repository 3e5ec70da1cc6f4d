"""What a quantizer of training is: how weights and inputs are rounded in float while a model learns, and what a layer
must hold to give the same numbers afterwards.

A quantizer is one file with one class. For every site it makes a `WeightRounding` and an `InputRounding`, modules whose
parameters are scales: they get a learning rate of their own and no weight decay.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qkernels.weights import Weight, weight_from_codes

from ..ptq.base import NoOptions, SiteState, weight_scales
from ..recipes import Treatment

FARTHEST = 100.0  # a scale that has left [start / 100, 100 start] is no scale any more


class Rounding(nn.Module):
    """Rounds one tensor in float and lets gradients through, each in its own way. `training` is set while a model
    learns; rounding is the same without, or a deployed model would be another one."""

    def __init__(self, plan: Treatment) -> None:
        super().__init__()
        self.plan = plan
        self.number: int | None = None  # None: in a loop of somebody's own

    def begin(self, number: int) -> None:
        """Called by the trainer before each part of a step, with a number that follows from the seed, the step and the
        part: what is drawn at random in it follows from that."""
        self.number = number

    def penalty(self, x: Tensor, done: float) -> Tensor | None:
        """What is added to the loss, once per step: of the float weight, or of nothing for an input. `done`: share of
        the steps that are over, 0..1."""
        return None

    def after(self, x: Tensor, done: float) -> None:
        """Called behind each step of the optimizer, with the float weight: what follows from what has been learned."""

    def fault(self) -> str:
        """What has gone wrong with the scales, as the end of a sentence; empty while nothing has."""
        return ""


class LearnedScale(nn.Module):
    """Positive scales as their logarithms, so that no step makes one 0 or negative, and a step of Adam is a relative
    one. `sign`: of a grid that is turned around."""

    origin: Tensor
    sign: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(shape))
        self.register_buffer("sign", torch.ones(shape))
        self.register_buffer("origin", torch.zeros(shape))

    @torch.no_grad()
    def start(self, scale: Tensor) -> None:
        """At these scales, none of which is 0."""
        self.log.copy_(scale.abs().log())
        self.origin.copy_(self.log)
        self.sign.copy_(scale.sign())

    def forward(self) -> Tensor:
        return self.sign * self.log.exp()

    def fault(self) -> str:
        off = (self.log.detach() - self.origin).abs().max()
        if off <= math.log(FARTHEST):
            return ""
        return f"a scale has left the range of {FARTHEST:g} times below and above where it started"


class WeightRounding(Rounding):
    """Of a weight `[N, K]`, to the site's transformed input."""

    def __init__(self, weight: Tensor, plan: Treatment) -> None:
        super().__init__(plan)
        self.grid = plan.grid
        self.group = weight.shape[1] if self.grid.group is None else min(self.grid.group, weight.shape[1])

    def start(self, weight: Tensor) -> None:
        """Find the scales of this weight, as training begins with them."""

    def start_at(self, weight: Tensor, found: Weight) -> Tensor:
        """Begin with the scales that `found` has, on the plan's grid. -> the weight next to `weight`, float32
        `[N, K]`, that is rounded to the codes of `found`"""
        raise NotImplementedError

    def scales(self, weight: Tensor) -> Tensor:
        """Float32 `[N, groups]`, as the container holds them."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """Values of the grid, float32 `[N, K]`, with the gradient of this quantizer."""
        raise NotImplementedError

    @torch.no_grad()
    def deployed(self, weight: Tensor) -> Tensor:
        """What the deployed layer multiplies by, float32 `[N, K]`."""
        return self.quantized(weight).dequantize()

    @torch.no_grad()
    def quantized(self, weight: Tensor) -> Weight:
        """The codes of what `forward` gives."""
        scales = self.scales(weight)
        steps = scales.repeat_interleave(self.group, dim=1)[:, : weight.shape[1]]
        assert self.grid.zero is not None, "a grid whose zero is found needs a `quantized` of its own"
        codes = torch.round(self(weight) / steps + self.grid.zero)
        return weight_from_codes(codes, self.grid, scales)


class InputRounding(Rounding):
    """Of an input `[..., K]` behind the site's transforms. Sites that read one input share the instance. `watches`:
    calibration samples are shown to it before training, behind `start`."""

    watches = False

    def watch(self, x: Tensor) -> None:
        """An input `[..., K]` of the float model, behind the transforms."""

    def start(self, scale: Tensor, zero: Tensor | None) -> None:
        """Begin with a static scale float32 [] and zero point int32 [] (None: 0), found by the plan's observer. Not
        called for dynamic inputs."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def decide(self, state: SiteState, width: int) -> None:
        """Write into the state what the layer needs to round an input of `width` channels so."""


class Quantizer:
    """How training rounds. Register a subclass with `recipes.QUANTIZERS`, or name it in an entry point
    "qclip.quantizers"; its name is then the end of recipes' names.

    `options`: a frozen dataclass, as of `ptq.Method`. `objective` and `settings`: what the trainer does where nobody
    says otherwise. `rounds`: whether what comes out is a quantized model; without, a float one.
    """

    name: ClassVar[str]
    options: ClassVar[type] = NoOptions
    rounds: ClassVar[bool] = True
    objective: ClassVar[str] = "contrastive+100*mse"
    settings: ClassVar[dict[str, Any]] = {}  # of `training.Settings`: values that differ from its defaults
    from_codes: ClassVar[bool] = False  # whether a step of the recipe may have found codes: `WeightRounding.start_at`

    def __init__(self, options: Any) -> None:
        self.chosen = options

    @classmethod
    def treatment(cls, plan: Treatment) -> Treatment:
        """What `wXaY` means in the name of a recipe of this quantizer."""
        return plan

    @classmethod
    def methods(cls, plan: Treatment) -> tuple[str, ...]:
        """Post-training methods that come before it where the name of a recipe names none."""
        return ()

    def weight(self, weight: Tensor, plan: Treatment) -> WeightRounding:
        """For a float weight `[N, K]`. Raises RecipeError where the plan's grid is none that it trains on."""
        raise NotImplementedError

    def input(self, plan: Treatment, values: int) -> InputRounding:
        """For an input of which a sample has so many `values`."""
        raise NotImplementedError


def fitted_scales(weight: Tensor, plan: Treatment) -> Tensor:
    """Float32 `[N, groups]` by the plan's observer."""
    return weight_scales(weight, plan)[0]


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, bit for bit, with the gradient of x."""
    return _Through.apply(x, rounded)
