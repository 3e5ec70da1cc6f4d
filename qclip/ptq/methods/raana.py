"""RaanA (arXiv 2504.03717): rotated weights as RaBitQ codes, of as many bits at each site as is worth most.

A site's input is turned by a random Hadamard rotation (one for all sites that read it), the rows of its weight get
RaBitQ codes. The error of a layer then depends on the width alone, whatever the weight is, so that widths can be
allocated before anything is rounded: of all widths whose average stays within `average` those of least summed damage,
per tower (AllocateBits, `allocation.py`).

What a width damages: rounding turns row n of a rotated weight by an error of random direction, whose squared length is
`e(b) |w_n|^2`. To first order it moves the embedding by `sum_n <G_n, error_n>`, G the gradient by the weight; on
average the square of that is `e(b) sum_n |w_n|^2 |G_n|^2 / K`. This is damage "variance"; "bound" is the first-order
bound `2^-b |g| |X| |W| / sqrt(K)` of output gradients g and inputs X, "authors" that of the authors' code, which
divides it by the root of the number of outputs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from ... import calibration, seeds
from ...errors import DataError, NonFiniteError, RecipeError
from ...layers import Branch, RandomHadamard, stored_bits
from ...models.tower import Site
from ...recipes import Treatment
from .. import rabitq
from ..allocation import Choice, allocate
from ..base import Context, Method, SiteState

Damage = Literal["variance", "bound", "authors"]


@dataclasses.dataclass(frozen=True)
class Options:
    """`average`: code bits a weight, over the sites of a tower that the recipe treats by its default; None: the
    recipe's weight bits. `widths`: those that a site may get. `scale`: the rule of `rabitq.scales`. `damage`: what a
    width costs a site. `samples`: images, or captions, whose gradients say so.

    Side terms, held in 16 bits beside the codes: `centralize`: the mean over outputs. `held_out`: that share of the
    input columns, those of largest norm; the authors' is 0.003."""

    average: float | None = None
    widths: tuple[int, ...] = tuple(range(1, rabitq.MOST_BITS + 1))
    scale: rabitq.ScaleRule = "unbiased"
    damage: Damage = "variance"
    samples: int = 128
    centralize: bool = False
    held_out: float = 0.0

    def __post_init__(self) -> None:
        if not self.widths or set(self.widths) - set(range(1, rabitq.MOST_BITS + 1)):
            raise ValueError(f"widths lie between 1 and {rabitq.MOST_BITS} bits, not {list(self.widths)}")
        if self.average is not None:
            self.check(self.average)
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is a share from 0 to below 1, not {self.held_out:g}")
        if self.samples < 1:
            raise ValueError(f"samples must be 1 or more, not {self.samples}")

    def check(self, average: float) -> None:
        """Raises ValueError for an average that no widths have."""
        low, high = min(self.widths), max(self.widths)
        if not low <= average <= high:
            raise ValueError(f"an average of {average:g} bits cannot be met by widths from {low} to {high}")


class RaanA(Method):
    """Rotated weights as RaBitQ codes, with widths allocated by what they do to the embeddings."""

    name = "raana"
    options = Options
    needs = frozenset({"gradients"})
    decides = frozenset({"input", "weight"})

    def side_bits(self, plan: Treatment, n: int, k: int) -> int:
        rank = int(self.chosen.held_out * k) + self.chosen.centralize
        return 8 * RandomHadamard.shape(k)[0] * k + 16 * rank * (n + k)

    def check(self, context: Context) -> None:
        recipe = context.recipe
        if not _taking_part(context):
            raise RecipeError("raana has no site: all that the recipe quantizes are exceptions, patches or embeddings")
        plan = recipe.default
        usual = plan.weight_grid in (None, "midrise") and plan.weight_scale == "channel"
        if not usual or plan.weight_observer != "min-max":
            raise RecipeError(
                f"recipe {recipe.name!r}: raana decides grid and scales of weights; leave out weight_grid, "
                "weight_scale and weight_observer"
            )
        try:
            self.chosen.check(self._average(context))
        except ValueError as why:
            raise RecipeError(f"recipe {recipe.name!r}: method 'raana': {why}") from None

    def prepare(self, context: Context) -> None:
        taking_part = _taking_part(context)
        self._rotate(context, taking_part)
        noted = {}
        for tower in dict.fromkeys(state.site.tower for state in taking_part):
            states = [state for state in taking_part if state.site.tower == tower]
            widths = self._widths(context, tower, states)
            noted[tower] = self._encode(context, states, widths)
        context.notes["raana"] = noted

    def _rotate(self, context: Context, states: list[SiteState]) -> None:
        """One rotation for every input, behind the transforms that it has."""
        rotations: dict[str, RandomHadamard] = {}
        for state in states:
            width, key = state.float_weight().shape[1], state.site.shared
            if key not in rotations:
                rotation = RandomHadamard.drawn(width, seeds.generator(context.seed, f"rotation of {key}"))
                rotations[key] = rotation.to(state.source.weight.device)  # type: ignore[union-attr, arg-type]
            side = self._side_terms(state.folded()[0])
            state.transforms = [*state.transforms, rotations[key]]
            if side is not None:
                state.branch = Branch(rotations[key].input(side[0]), side[1])

    def _side_terms(self, w: Tensor) -> tuple[Tensor, Tensor] | None:
        """The matrices `[rank, K]` and `[N, rank]` of what stays float of a weight before it is turned."""
        n, k = w.shape
        held = w.square().sum(0).topk(int(self.chosen.held_out * k)).indices
        downs, ups = [torch.eye(k, device=w.device)[held]], [w[:, held]]
        if self.chosen.centralize:
            downs.append(w.mean(0, keepdim=True).index_fill(1, held, 0.0))
            ups.append(w.new_ones(n, 1))
        down, up = torch.cat(downs), torch.cat(ups, 1)
        return (down, up) if len(down) else None

    def _widths(self, context: Context, tower: str, states: list[SiteState]) -> list[int]:
        """The width of each site of one tower."""
        average = self._average(context)
        widths, sizes = sorted(set(self.chosen.widths)), [state.float_weight().numel() for state in states]
        importance = self._importance(context, tower, states)
        by_variance = self.chosen.damage == "variance"
        cost = {b: rabitq.relative_error(b, self.chosen.scale) if by_variance else 0.5**b for b in widths}
        choices = [
            [Choice(b * size, importance[state.site.name] * cost[b]) for b in widths]
            for state, size in zip(states, sizes, strict=True)
        ]
        chosen = allocate(choices, int(average * sum(sizes)))
        return [widths[index] for index in chosen]

    def _average(self, context: Context) -> float:
        return context.recipe.default.weight_bits if self.chosen.average is None else self.chosen.average

    def _importance(self, context: Context, tower: str, states: list[SiteState]) -> dict[str, float]:
        """By name, what a relative error of 1 in the weight of a site costs; summed over samples."""
        samples = context.need_samples().first(self.chosen.samples)
        squares = {state.site.name: state.folded()[0].square().sum(1) for state in states}  # of rows
        by_site = {state.site.name: state for state in states}
        sums: dict[str, Tensor] = {}

        def see(site: Site, x: Tensor, gradient: Tensor, _: calibration.Batch) -> None:
            x, rows = by_site[site.name].input(x), squares[site.name]
            if self.chosen.damage == "variance":
                by_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
                found = (rows * by_weight.square().sum(1)).sum() / x.shape[-1]
            else:
                size = rows.sum().sqrt() / x.shape[-1] ** 0.5
                g, lengths = gradient.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1) * size
                found = (g * lengths).sum()
                if self.chosen.damage == "authors":  # the product of two means, each behind its root
                    tokens = x[0].numel() / x.shape[-1]
                    found = torch.stack([g.sum() / gradient[0].numel() ** 0.5, lengths.sum() / tokens**0.5])
            sums[site.name] = sums.get(site.name, torch.zeros_like(found)) + found

        calibration.gradients(
            context.encoders, samples, tower, [s.site for s in states], see, context.seed, context.progress
        )
        if unseen := [name for name in squares if name not in sums]:
            hint = "the model has no tokenizer, set model.tokenizer" if samples.tokens is None else "leave it float"
            raise DataError(f"{unseen[0]} saw nothing during calibration, so raana cannot tell its worth; {hint}")
        worth = {name: float(found.prod()) for name, found in sums.items()}
        if beyond := [name for name, found in worth.items() if not math.isfinite(found)]:
            raise NonFiniteError(f"{beyond[0]}: its weights, inputs or gradients are too large for their squares")
        return worth

    def _encode(self, context: Context, states: list[SiteState], widths: list[int]) -> dict:
        """Decides the codes. Returns what is told of a tower: its average of code bits, that of all bits stored, and
        the squared error of its weights, relative to their squares, beside what RaBitQ promises whatever they are."""
        stage, weights, stored = f"RaBitQ codes of the {states[0].site.tower} tower", 0, 0
        error, expected, square = 0.0, 0.0, 0.0
        for done, (state, bits) in enumerate(zip(states, widths, strict=True)):
            context.report(stage, done, len(states))
            weight, _ = state.folded()
            try:
                state.weight, grid = rabitq.quantize(weight, bits, self.chosen.scale)
            except ValueError as why:
                raise NonFiniteError(f"{state.site.name}: {why}") from why
            state.plan = dataclasses.replace(
                state.plan, weight_bits=bits, weight_grid=grid.kind, group=None, weight_observer="min-max"
            )
            size = float(weight.square().sum())
            weights, square = weights + weight.numel(), square + size
            stored += stored_bits(state.weight, grid, state.transforms, state.branch)
            error += float((state.weight.dequantize() - weight).square().sum())
            expected += size * rabitq.relative_error(bits, self.chosen.scale)
        context.report(stage, len(states), len(states))
        return {
            "code_bits": sum(b * s.float_weight().numel() for b, s in zip(widths, states, strict=True)) / weights,
            "stored_bits": stored / weights,
            "weight_error": error / square if square else 0.0,
            "expected_weight_error": expected / square if square else 0.0,
            "widths": {state.site.name: bits for state, bits in zip(states, widths, strict=True)},
        }


def _taking_part(context: Context) -> list[SiteState]:
    """By the recipe: an earlier step may have given sites other plans."""
    recipe = context.recipe
    sites = [state for state in context.states.values() if state.site.kind not in ("patch", "embedding")]
    return [state for state in sites if recipe.plan(state.site.name, state.site.kind) == recipe.default]
