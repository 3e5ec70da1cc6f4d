"""HQQ (Badri & Shaji 2023, mobiusml/hqq `core/optimize.py`): real zero points by half-quadratic splitting, no data.

The error `sum |W - s (q - z)|^p` of a group, p = 0.7, lets a few weights err much so that most err little. Its zero is
searched in rounds: the errors that count as outliers, `shrink(W - W^)`, are set aside, and the zero is the mean that
the rest asks for. That is no exact proximal step, so the error does not fall by itself: a group keeps the best zero
that it has seen. The weight is divided by its scales first; else the shrinkage, whose threshold is a number, would see
every error of a usual weight as none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from qkernels import weights
from qkernels.contract import TINY
from qkernels.grids import Grid
from qkernels.weights import Weight

from ...errors import NonFiniteError, RecipeError
from ...layers import grid_bits
from ...recipes import Treatment
from ..base import Context, Method, SiteState

_AT_ONCE = 1 << 16  # weights of a chunk of rows, so that the temporaries of a round stay in the cache


@dataclasses.dataclass(frozen=True)
class Options:
    """`p`: the exponent of the error, above 0 to 1. `beta`, `growth`: the shrinkage takes `|e|^(p-1) / beta` off an
    error e in steps of the grid; beta is multiplied by `growth` after each of at most `rounds` rounds."""

    p: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    rounds: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p must lie above 0 and not above 1, not at {self.p:g}")
        if self.beta <= 0 or self.growth < 1:
            raise ValueError(f"beta must be positive and growth at least 1, not {self.beta:g} and {self.growth:g}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be 1 or more, not {self.rounds}")


class HQQ(Method):
    """Search a real zero point for every group of weights, without data; weights of up to 4 bits."""

    name = "hqq"
    stage = "HQQ"
    options = Options
    decides = frozenset({"weight"})

    def side_bits(self, plan: Treatment, n: int, k: int) -> int:
        if plan.weight_bits > 4:
            return 0
        return grid_bits(dataclasses.replace(plan.grid, kind="floatzero"), n, k) - grid_bits(plan.grid, n, k)

    def check(self, context: Context) -> None:
        fitting = _fitting(context)
        if not fitting:
            raise RecipeError(
                "hqq moves the zero points of channels or groups, which kernels multiply at up to 4 bits, and no "
                "site of this recipe has such weights; use it with w2 to w4 (w4a16-hqq), or leave it out"
            )
        for name, state in fitting.items():
            if state.plan.weight_grid not in (None, "floatzero"):
                raise RecipeError(
                    f"hqq puts weights on the grid 'floatzero', and that of {name} is to be {state.plan.weight_grid!r}"
                    "; leave out weight_grid"
                )

    def finish(self, context: Context) -> None:
        fitting = _fitting(context)
        for done, (name, state) in enumerate(fitting.items()):
            context.report(self.stage, done, len(fitting))
            state.plan = dataclasses.replace(state.plan, weight_grid="floatzero")
            try:
                state.weight = quantize(state.folded()[0], state.plan, self.chosen)
            except ValueError as error:
                raise NonFiniteError(f"{name}: {error}") from error
        context.report(self.stage, len(fitting), len(fitting))
        context.notes["hqq_sites"] = len(fitting)


def _fitting(context: Context) -> dict[str, SiteState]:
    return {name: state for name, state in context.states.items() if fits(state)}


def fits(state: SiteState) -> bool:
    """Whether a zero point of its weights has a kernel. The patch and the embedding have 8 bits in every recipe that
    does not name them, and stay rounded to nearest."""
    return state.plan.weight_bits <= 4 and state.plan.weight_scale == "channel"


def quantize(weight: Tensor, plan: Treatment, options: Options, seen: Callable[[Tensor], None] | None = None) -> Weight:
    """Float `[N, K]` on the plan's grid `floatzero`: scales by its observer, zeros by search. `seen` is shown the kept
    error of every group, `[rows, groups]`, before the search and after each round."""
    grid = plan.grid
    scales, zeros = grid.fit(weight, plan.weight_observer)
    assert zeros is not None  # of floatzero
    grouped = grid.grouped(weight) * (1 / scales[:, :, None])
    counted = grid.grouped(torch.ones_like(weight[:1]))  # 0 where the last group is filled up
    rows = max(1, _AT_ONCE // (grouped.shape[1] * grouped.shape[2]))
    for part, zero in zip(grouped.split(rows), zeros.split(rows), strict=True):
        zero.copy_(search(part, zero, counted, grid, options, seen))
    return weights.quantize_weight(weight, grid, scales, zeros)


def search(
    w: Tensor,
    start: Tensor,
    counted: Tensor,
    grid: Grid,
    options: Options,
    seen: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The best zeros found, float32 `[N, groups]`, for weights in steps of the grid, `[N, groups, group]`."""
    one, sizes = torch.ones((), device=w.device), counted.sum(2)
    zero, beta = start, options.beta
    best, least = start, torch.full_like(start, torch.inf)
    for _ in range(options.rounds + 1):
        codes = grid.encode(w, one, zero[:, :, None])
        off = (w - codes).add_(zero[:, :, None]).mul_(counted)
        size = off.abs()
        powers = size.log().mul_(options.p).exp_()  # |e|^p, in less time than by `pow`
        error = powers.sum(2)
        better = error < least
        best, least = torch.where(better, zero, best), torch.where(better, error, least)
        if seen is not None:
            seen(least)
        shrunk = (size - powers.div_(size.clamp(min=TINY)).div_(beta)).clamp_(min=0)
        apart = shrunk.copysign_(off)
        zero = ((codes - w).add_(apart).mul_(counted).sum(2) / sizes).half().float()  # as an Int4Weight holds it
        beta *= options.growth
    return best
