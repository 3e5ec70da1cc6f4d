"""RepQ-ViT (arXiv 2212.08254): per-tensor quantizers that give the codes of channel-wise ones.

What a norm gives differs much from channel to channel. Every channel j gets a scale s_j and a zero point z_j of its
own, and then the input is changed until one pair serves all, s~ = mean s_j and a whole z~ near mean z_j: with
r_j = s_j / s~

    x'_j = (x_j + s_j (z_j - z~)) / r_j,    W'_j = W_j r_j,    b' = b - sum_j W_j s_j (z_j - z~)

is the same product, and `rne(x' / s~) + z~ = rne(x / s_j) + z_j`. The scale runs in the kernel that quantizes, the
shift in the norm's bias. Other inputs get one range. All ranges, and those of weights, are the best of three
percentiles by squared error. Blocks see inputs from quantized blocks, sites from quantized sites. The log-sqrt2 codes
of the softmax are a recipe's `attention`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ... import calibration
from ...errors import NonFiniteError, RecipeError
from ...layers import Scale, Shift
from ...layers.activations import ASYM, code_range, static_quantizer
from ...recipes import FLOAT, Treatment
from ..base import Context, Method, SiteState
from ..driver import BlockRun

PERCENTILES = (99.9, 99.99, 99.999)


@dataclasses.dataclass(frozen=True)
class Options:
    """`samples`: images, or captions, whose inputs are looked at. The paper takes 32 images; 32 captions are few
    tokens, and what lies outside a channel's range is clipped."""

    samples: int = 128

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be 1 or more, not {self.samples}")


class RepQViT(Method):
    """Static inputs of norms with a scale and zero point per channel, made one by a change of the weights."""

    name = "repq-vit"
    stage = "RepQ-ViT"
    options = Options
    needs = frozenset({"inputs"})
    decides = frozenset({"input"})
    inputs = "quantized"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.samples = options.samples

    def side_bits(self, plan: Treatment, n: int, k: int) -> int:
        return 64 * k

    def check(self, context: Context) -> None:
        for state in _ranged(context):
            _check(state, context.recipe.plan(state.site.name, state.site.kind))

    def prepare(self, context: Context) -> None:
        inside = {site.name for t in context.towers.values() for block in t.blocks for site in block.sites.values()}
        for state in _ranged(context):
            found = "percentile" if state.site.name in inside else "mse"
            state.plan = dataclasses.replace(
                state.plan, static=True, activation_grid=ASYM, activation_observer=found, weight_observer="percentile"
            )

    def block(self, context: Context, run: BlockRun) -> None:
        # A projection reads one position of a sample: too few for a range per channel. It gets one of all samples.
        for group in _groups([state for state in run.states.values() if state.site.kind != "projection"]):
            seen: list[Tensor] = []
            run.observe({group[0].site.shared: seen.append})
            if _reads_norm(group[0]):
                _reparameterize(group, seen)
            elif seen:
                _one_range(group, seen)
            if seen:  # else no sample reaches it, which is told when its static scale is looked for
                run.use([state.site for state in group])


def _ranged(context: Context) -> list[SiteState]:
    return [state for state in context.states.values() if state.site.kind not in ("embedding", "patch")]


def _check(state: SiteState, wanted: Treatment | None) -> None:
    """`wanted`: the plan before earlier steps gave the site another one."""
    plan, name = state.plan, state.site.name
    if plan.activation_bits == FLOAT:
        raise RecipeError(
            f"repq-vit changes how inputs are quantized, and that of {name} is float (a16); use 2 to 8 activation "
            "bits, or a method for weights"
        )
    if plan.activation_observer != "mse":
        raise RecipeError(f"repq-vit finds the input range of {name} itself; drop activation_observer")
    if wanted is not None and wanted.weight_observer not in ("min-max", "percentile"):
        raise RecipeError(f"repq-vit finds the weight scales of {name} by percentiles; drop weight_observer")


def _reads_norm(state: SiteState) -> bool:
    return state.site.feed == "norm" and isinstance(state.source, nn.Linear)


def _groups(states: list[SiteState]) -> list[list[SiteState]]:
    """Sites that share an input and its bits."""
    found: dict[tuple[str, int], list[SiteState]] = {}
    for state in states:
        found.setdefault((state.site.shared, state.plan.activation_bits), []).append(state)
    return list(found.values())


def channel_quantizers(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and whole zero points of the columns of float `[n, K]`: float64 `[K]`, each the best of three percentiles
    by squared error. The range need not hold 0, nor the zero point be a code; a scale is 0 where the range is."""
    least, most = code_range(bits, ASYM)
    x = x.double()
    ranked = x.sort(0).values
    best = torch.full_like(x[0], torch.inf)
    scales, zeros = torch.zeros_like(best), torch.zeros_like(best)
    for percentile in PERCENTILES:
        low, high = _percentile(ranked, 100 - percentile), _percentile(ranked, percentile)
        scale = (high - low) / (most - least)
        safe = torch.where(scale > 0, scale, 1.0)
        zero = least - torch.round(low / safe)
        off = ((x / safe).round() + zero).clamp(least, most).sub(zero).mul(safe).sub(x)
        error = off.square().sum(0)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros


def _percentile(ranked: Tensor, percentile: float) -> Tensor:
    """Of sorted columns, with straight lines between values."""
    place = percentile / 100 * (len(ranked) - 1)
    below = min(int(place), len(ranked) - 1)
    return torch.lerp(ranked[below], ranked[min(below + 1, len(ranked) - 1)], place - below)


def _reparameterize(group: list[SiteState], seen: list[Tensor]) -> None:
    if not seen:
        return
    first = group[0]
    x = torch.cat([first.input(each).flatten(0, -2).float() for each in seen])
    if not x.isfinite().all():
        raise _not_finite(first)
    bits = first.plan.activation_bits
    scales, zeros = channel_quantizers(x, bits)
    alive = scales > 1e-6 * scales.max()  # in the others nothing changes that a code could tell
    if not alive.any():
        _one_range(group, seen)
        return
    least, most = code_range(bits, ASYM)
    scale = scales[alive].mean().float()
    zero = zeros[alive].mean().round().clamp(least, most)  # whole, so that the grid has an exact zero
    scales = torch.where(alive, scales, scale.double())
    zeros = torch.where(alive, zeros, zero - torch.round(x[0].double() / scale))
    factor = (scale.double() / scales).float()
    transforms = [*first.transforms, Shift((scales * (zero - zeros)).float()), Scale(factor)]
    for state in group:
        state.transforms = transforms
        state.input_scale, state.input_zero = scale, zero.to(torch.int32)


def _one_range(group: list[SiteState], seen: list[Tensor]) -> None:
    first, histogram = group[0], calibration.Histogram()
    for each in seen:
        histogram.update(first.input(each))
    if not histogram.finite:
        raise _not_finite(first)
    spans = [histogram.percentiles(first.plan, percentile) for percentile in PERCENTILES]
    best = min(spans, key=lambda span: histogram.mean_squared_error(span, first.plan))
    for state in group:
        state.input_scale, state.input_zero = static_quantizer(*best, first.plan.activation_bits, ASYM)


def _not_finite(state: SiteState) -> NonFiniteError:
    return NonFiniteError(
        f"the input of {state.site.name} is NaN or Inf during calibration; check the weights before it and "
        "the calibration images"
    )
