"""PTQ4ViT (arXiv 2111.12293): scales of weights and inputs searched in turn by what their errors do to the embedding.

The metric of a site is `sum (g (o - o^))^2` over some positions, o its float output and g the gradient by it
(`curvature.py`). Sites that share an input share its scale. Behind GELU an input may be a *twin*: one bit says on which
side of 0 it lies, below 0 the step is fixed by the function's minimum, above it is searched; that has no kernel. (The
twin codes of the softmax are a recipe's `attention`.) Per-tensor weights, the paper's, are the recipe's `weight_scale`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from qkernels.weights import quantize_weight

from ...errors import NonFiniteError, RecipeError
from ...layers.activations import quantize_dequantize, quantize_twin
from ...models.tower import Mlp
from ...recipes import FLOAT
from ..base import Context, Method, SiteState, weight_scales
from ..curvature import Curvature, curvature

LEAST = {"gelu": 0.169971, "gelu_tanh": 0.170041, "quick_gelu": 0.163610}  # |minimum| of the activation


@dataclasses.dataclass(frozen=True)
class Options:
    """`samples`: images, or captions; `rows`: about how many of their positions are looked at. `candidates`: scales,
    evenly from 0.01 to 1.2 of the min-max one; every `stride`-th is tried, then those around the best (1: all are).
    `twin`: two ranges behind GELU (simulated); without, all sites run on kernels. `metric`: "hessian", or "mse", which
    leaves the gradients out."""

    samples: int = 32
    rows: int = 512
    rounds: int = 3
    candidates: int = 101
    stride: int = 5
    twin: bool = True
    metric: Literal["hessian", "mse"] = "hessian"

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("rows", 1), ("rounds", 1), ("candidates", 2), ("stride", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, not {getattr(self, name)}")


class PTQ4ViT(Method):
    """Scales of weights and static inputs in turn, by a metric that knows gradients; twin ranges behind GELU."""

    name = "ptq4vit"
    options = Options
    needs = frozenset({"inputs", "gradients"})
    decides = frozenset({"input", "weight"})

    def check(self, context: Context) -> None:
        for state in _searched(context):
            _check(state)

    def prepare(self, context: Context) -> None:
        states = _searched(context)
        for state in states:
            state.plan = dataclasses.replace(state.plan, static=True)
        chosen: Options = self.chosen
        samples = context.need_samples().first(chosen.samples)
        seen = curvature(context, samples, [state.site for state in states], chosen.rows)
        twins = _twins(context) if chosen.twin else {}
        groups: dict[tuple[str, int], list[SiteState]] = {}
        for state in states:
            if state.site.name in seen.squares:
                groups.setdefault((state.site.shared, state.plan.activation_bits), []).append(state)
        gains = {}
        for done, ((shared, bits), group) in enumerate(groups.items()):
            context.report("PTQ4ViT search", done, len(groups))
            search = Search(group, seen, chosen, twins.get(group[0].site.name))
            history = search.run()
            gains[f"{shared} a{bits}"] = history[-1] / history[0] if history[0] > 0 else 1.0
        context.report("PTQ4ViT search", len(groups), len(groups))
        context.notes["ptq4vit_metric"] = gains  # of min-max scales, what is left


def _searched(context: Context) -> list[SiteState]:
    states = [state for state in context.states.values() if state.site.kind != "embedding"]
    return [state for state in states if isinstance(state.source, nn.Linear)]


def _check(state: SiteState) -> None:
    plan, name = state.plan, state.site.name
    if plan.activation_bits == FLOAT:
        raise RecipeError(
            f"ptq4vit searches scales of inputs, and that of {name} is float (a16); use 2 to 8 activation bits, or a "
            "method for weights"
        )
    if plan.activation_grid != "sym" or plan.activation_observer != "mse":
        raise RecipeError(
            f"ptq4vit finds sym input scales of {name} itself; drop activation_grid and activation_observer"
        )
    if plan.weight_observer != "min-max":
        raise RecipeError(f"ptq4vit searches weight scales of {name} itself; drop weight_observer")


def _twins(context: Context) -> dict[str, float]:
    """|Least input| of the sites that read an activation with two ranges, by name."""
    found = {}
    for tower in context.towers.values():
        for block in tower.blocks:
            core = None if block.mlp is None else getattr(*block.mlp)
            site = block.sites.get("fc2")
            if site is None or not isinstance(core, Mlp) or core.inner_norm is not None or core.gate is not None:
                continue
            if core.activation in LEAST:
                found[site.name] = LEAST[core.activation]
    return found


class Search:
    """The scales of one input and of the weights that read it. `least`: of a twin, how far it reaches below 0."""

    def __init__(self, group: list[SiteState], seen: Curvature, options: Options, least: float | None) -> None:
        self.group, self.options = group, options
        first = group[0]
        self.bits = first.plan.activation_bits
        self.x = first.input(seen.inputs[first.site.shared]).float()
        if not self.x.isfinite().all():
            raise NonFiniteError(
                f"the input of {first.site.name} is NaN or Inf during calibration; check the weights before it and "
                "the calibration images"
            )
        self.weights = [state.folded()[0].float() for state in group]
        self.wanted = [self.x @ w.T for w in self.weights]
        hessian = options.metric == "hessian"
        squares = [seen.squares[state.site.name] if hessian else torch.ones(()) for state in group]
        top = max((float(each.max()) for each in squares), default=0.0)
        # One unit for the group: gradients may be so small that their squares times errors leave float32.
        self.squares = [each / top if top > 0 else torch.ones(()) for each in squares]
        self.negative = None
        if least is not None:  # a transform may have moved it
            least = least if not first.transforms else max(float(-self.x.min()), 0.0)
            self.negative = least / 2 ** (self.bits - 1) or None
        codes = 2 ** (self.bits - 1) - 1
        largest = float(self.x.max() if self.negative is not None else self.x.abs().max())
        self.start = largest / codes if largest > 2.0**-100 else 1.0
        self.starts = [weight_scales(w, state.plan)[0] for w, state in zip(self.weights, group, strict=True)]  # min-max
        self.factor = 1.0  # of the input's scale
        self.factors = [torch.ones(len(w), 1, device=w.device) for w in self.weights]
        self.candidates = torch.linspace(0.01, 1.2, options.candidates)

    def input(self, factor: float) -> Tensor:
        """The input on its codes."""
        scale = torch.tensor(self.start * factor)
        if self.negative is not None:
            return quantize_twin(self.x, self.bits, scale, self.negative)
        return quantize_dequantize(self.x, self.bits, scale)

    def weight(self, at: int, factors: Tensor) -> Tensor:
        """A weight on its codes, with factors `[N, 1]` of its scales."""
        state = self.group[at]
        grid = state.plan.grid
        return quantize_weight(self.weights[at], grid, grid.held(self.starts[at] * factors)).dequantize()

    def errors(self, at: int, x: Tensor, w: Tensor) -> Tensor:
        """The metric of one site by outputs: float64 `[N]`."""
        off = self.wanted[at] - x @ w.T
        return (off.square_().mul_(self.squares[at])).sum(0, dtype=torch.float64)

    def metric(self) -> float:
        x = self.input(self.factor)
        return sum(float(self.errors(at, x, self.weight(at, f)).sum()) for at, f in enumerate(self.factors))

    def run(self) -> list[float]:
        """Decides the states; the metric with min-max scales and after each round, which never rises."""
        history = [self.metric()]
        for _ in range(self.options.rounds):
            for at in range(len(self.group)):
                self._search_weight(at)
            self._search_input()
            history.append(self.metric())
            if history[-1] == history[-2]:
                break
        for at, state in enumerate(self.group):
            grid = state.plan.grid
            state.weight = quantize_weight(self.weights[at], grid, grid.held(self.starts[at] * self.factors[at]))
            state.input_scale = torch.tensor(self.start * self.factor)
            state.negative_step = self.negative
        return history

    def _search_weight(self, at: int) -> None:
        x, best = self.input(self.factor), self.factors[at]
        whole = self.group[at].plan.weight_scale == "tensor"
        least = self._shared(self.errors(at, x, self.weight(at, best)), whole)

        def look(tried: Tensor) -> None:
            nonlocal best, least
            error = self._shared(self.errors(at, x, self.weight(at, tried)), whole)
            better = error < least
            best = torch.where(better[:, None], tried, best)
            least = torch.where(better, error, least)

        for candidate in self.candidates[:: self.options.stride]:
            look(torch.full_like(best, float(candidate)))
        for tried in self._around(best):
            look(tried)
        self.factors[at] = best

    @staticmethod
    def _shared(errors: Tensor, whole: bool) -> Tensor:
        """Of outputs that share a scale: the sum of all."""
        return errors.sum().expand_as(errors) if whole else errors

    def _search_input(self) -> None:
        weights = [self.weight(at, factors) for at, factors in enumerate(self.factors)]

        def error(factor: float) -> float:
            x = self.input(factor)
            return sum(float(self.errors(at, x, w).sum()) for at, w in enumerate(weights))

        # The first of equal ones: what it is now.
        self.factor = min([self.factor, *self.candidates[:: self.options.stride].tolist()], key=error)
        self.factor = min([self.factor, *map(float, self._around(torch.tensor(self.factor)))], key=error)

    def _around(self, best: Tensor) -> list[Tensor]:
        """By steps between candidates, up to the next that were tried first: factors around `best`."""
        step, stride = float(self.candidates[1] - self.candidates[0]), self.options.stride
        least = float(self.candidates[0])
        return [(best + i * step).clamp(min=least) for i in range(1 - stride, stride) if i]
