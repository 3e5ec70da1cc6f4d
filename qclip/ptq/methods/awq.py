"""AWQ (arXiv 2306.00978): weights of channels with large inputs are scaled up before they are rounded, then clipped.

`s_j = mean|X_j|^r`, at least 1e-4, divided by sqrt(max s * min s). The weight is multiplied by s, the input divided by
it when it is quantized. The strength r of every shared input is the one of {0, 1/20 .. 19/20} with the least squared
error of what its sites give, with the input quantized as the recipe wants: a scale that helps weights may hurt codes of
activations. r = 0 is no scale. (The paper judges q, k and v by what the attention gives. On `photos`, W3A8 and W4A8,
that left larger errors of embeddings, in twice the time.)

Then the range of every group of weights is shrunk by up to a half where its part of the products errs less; queries and
keys are not clipped: their products meet in a softmax. Clipping gains least where a scale has made single weights
large, so r = 0 is clipped as well, and what errs least is taken, of a site without clipping where that errs less: on
these inputs nothing errs more than rounding to nearest.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qkernels import weights
from qkernels.weights import Weight

from ... import calibration
from ...errors import NonFiniteError
from ...layers import Scale
from ...recipes import Treatment
from ..base import Context, Method, SiteState, quantize_weight
from ..driver import BlockRun
from ..moments import multiplied

STRENGTHS = tuple(i / 20 for i in range(20))
RANGES = tuple(1 - i / 20 for i in range(10))  # of a group's largest weight
LEAST = 1e-4
UNCLIPPED = ("q", "k", "pool_q", "pool_k")


@dataclasses.dataclass(frozen=True)
class Options:
    """`strength`: one r for all sites, from 0 to below 1; None: searched. `clip`: whether ranges are shrunk; they never
    are where a later step finds the codes. `rows`: inputs of a site that errors are taken on. `samples`: images, or
    captions, from which they are."""

    strength: float | None = None
    clip: bool = True
    rows: int = 1024
    samples: int = 128

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 <= self.strength < 1:
            raise ValueError(f"strength must be 0 or more and below 1, not {self.strength:g}")
        for name in ("rows", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")


class AWQ(Method):
    """Scale up weights whose inputs are large, by a strength searched per input, and clip the others' ranges."""

    name = "awq"
    stage = "AWQ search"
    options = Options
    needs = frozenset({"inputs"})
    leaves = frozenset({"weight"})
    resumes = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.samples = options.samples
        self.decides = frozenset({"input", "weight"} if options.clip else {"input"})

    def side_bits(self, plan: Treatment, n: int, k: int) -> int:
        return 32 * k

    def prepare(self, context: Context) -> None:
        self.clips = "weight" in context.recipe.decides(self.name)

    def block(self, context: Context, run: BlockRun) -> None:
        groups: dict[str, list[SiteState]] = {}
        for state in run.states.values():
            groups.setdefault(state.site.shared, []).append(state)
        rows = run.rows(self.chosen.rows)
        notes = context.notes.setdefault("awq_strength", {})
        for key, group in groups.items():
            if key not in rows:
                continue  # no sample comes here: rounded to nearest
            try:
                if not rows[key].square().isfinite().all():
                    raise ValueError("its inputs are NaN or infinite, or too large for their squares")
                found = self._search(group, rows[key])
                if group[0].scalable:
                    notes[key] = found
            except ValueError as why:
                raise NonFiniteError(f"{group[0].site.name}: {why}") from why

    def _search(self, group: list[SiteState], x: Tensor) -> float:
        """Gives sites that share the inputs `x` `[n, K]` the scale and the codes that err least; returns the strength.
        What is best without codes of clipped ranges need not be with them, so no scale at all is clipped, too."""
        first, before = group[0], list(group[0].transforms)
        finds = first.plan.static and first.input_scale is None
        size = first.input(x).float().abs().mean(0)
        wanted = [state.input(x).float() @ state.folded()[0].T for state in group]

        def error(choice: tuple[float, bool]) -> float:
            strength, clip = choice
            scale = scales[strength]
            for state in group:
                state.transforms = before if scale is None else [*before, scale]
            seen = first.input(x).float()
            if finds:  # of these inputs: those of all are found in the end
                found = calibration.static_input([seen], first.plan)
                for state in group:
                    state.input_scale, state.input_zero = found
            codes, total = multiplied(seen, first), 0.0
            for state, want in zip(group, wanted, strict=True):
                off, state.weight = _rounded(state, codes, want, clip)
                total += off
            return total

        strengths = STRENGTHS if self.chosen.strength is None else (self.chosen.strength,)
        if (
            not first.scalable or first.input_scale is not None
        ):  # which an earlier step has found for inputs as they are
            strengths = (0.0,)
        scales = {r: Scale(1 / channel_scale(size, r)) if r else None for r in (0.0, *strengths)}
        best = min(((r, False) for r in strengths), key=error)
        if self.clips:
            best = min((best, *((r, True) for r in {best[0], strengths[0]})), key=error)
        error(best)
        if finds:
            for state in group:
                state.input_scale = state.input_zero = None
        return best[0]


def channel_scale(size: Tensor, strength: float) -> Tensor:
    """`size^strength`, float32 `[K]`, balanced around 1; 1 for channels whose size, mean |x|, is 0: nothing is known of
    them."""
    scale = size.pow(strength).clamp(min=LEAST)
    seen = scale[size > 0]
    if not len(seen):
        return torch.ones_like(size)
    return torch.where(size > 0, scale / (seen.max() * seen.min()).sqrt(), 1.0)


def _rounded(state: SiteState, codes: Tensor, wanted: Tensor, clip: bool) -> tuple[float, Weight | None]:
    """Squared error of a site's products with quantized inputs `codes`, and its weight: None is to round to nearest.
    Groups are clipped each for itself and for inputs as quantized; a site keeps that where all of it errs less."""
    nearest = _error(quantize_weight(state.folded()[0], state.plan), codes, wanted)
    if not clip or state.site.kind in UNCLIPPED or state.plan.weight_scale == "tensor":
        return nearest, None
    weight = _shrunk(state, codes)
    error = _error(weight, codes, wanted)
    return (error, weight) if error < nearest else (nearest, None)


def _error(weight: Weight, codes: Tensor, wanted: Tensor) -> float:
    return float((codes @ weight.dequantize().T - wanted).square().sum())


def _shrunk(state: SiteState, codes: Tensor) -> Weight:
    """Codes whose groups have the ranges with the least error of their partial products."""
    plan, grid = state.plan, state.plan.grid
    weight, _ = state.folded()
    k = weight.shape[1]
    group = k if grid.group is None else min(grid.group, k)
    padded = torch.nn.functional.pad(codes, (0, -k % group)).unflatten(1, (-1, group))
    gram = torch.einsum("ngi,ngj->gij", padded, padded)  # a group's partial products err by d gram dT
    grouped = grid.grouped(weight)
    top = grouped.abs().amax(2, keepdim=True)
    best: tuple[Tensor, Tensor | None] | None = None
    least = torch.empty(0)
    for part in RANGES:
        clipped = torch.minimum(torch.maximum(grouped, -part * top), part * top).flatten(1)[:, :k]
        scales, zeros = grid.fit(weight if part == 1 else clipped, plan.weight_observer if part == 1 else "min-max")
        rounded = weights.quantize_weight(weight, grid, scales, zeros).dequantize()
        off = grid.grouped(weight - rounded)
        error = (torch.einsum("ngi,gij->ngj", off, gram) * off).sum(2)
        if best is None:
            best, least = (scales, zeros), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scales, best[0]), _where(better, zeros, best[1])
    assert best is not None
    return weights.quantize_weight(weight, grid, *best)


def _where(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    return None if new is None or old is None else torch.where(better, new, old)
