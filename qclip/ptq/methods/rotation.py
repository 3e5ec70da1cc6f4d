"""Rotation of every site's input (QuaRot, arXiv 2404.00456): `x D H^T`, random signs D, orthonormal Hadamard H.

It spreads outlying channels over all channels, so that no value is much larger than the others, neither of the input
nor of the weight, which carries the inverse. QuaRot folds its rotation into the residual stream and heads of a language
model, and the affine of every norm into what reads it. Here nothing is folded into neighbours (a site stays one weight
and transforms of its input, in the basis in which users, spectra and hooks see it), so the rotation runs before the
quantizer at every site: `hadamard_transform`.

Spread channels still make all others' steps coarser where they are very large. What folding norms does about that -
a norm's scale and offset cancel - is done at every input, from its statistics: a channel whose mean lies beyond
`outlying` times the usual size of channels is centred; one whose size does is scaled so that it is as large, relative
to the others, in the input as in the weight (a channel that nobody reads vanishes).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ... import calibration
from ...errors import RecipeError
from ...layers import RandomHadamard, Scale, Shift
from ...layers.transforms import Transform
from ...recipes import Treatment
from ...seeds import generator
from ..base import Context, Method, SiteState

UNREAD = 2.0**-10  # scale of a channel whose weights are 0


@dataclasses.dataclass(frozen=True)
class Options:
    """`outlying`: how many times the median size of channels a mean or a size must exceed to be taken out first.
    `clip`: scales of weights of up to 4 bits are those of least squared error, whatever the recipe says: rotated
    weights have no outliers that clipping could hurt."""

    outlying: float = 4.0
    clip: bool = True

    def __post_init__(self) -> None:
        if self.outlying < 1:
            raise ValueError(f"outlying must be 1 or more, not {self.outlying:g}")


class Rotation(Method):
    """Spread outlying channels over all channels by a random Hadamard rotation before the quantizer."""

    name = "rotation"
    options = Options
    needs = frozenset({"inputs"})
    decides = frozenset({"input"})

    def side_bits(self, plan: Treatment, n: int, k: int) -> int:
        return 8 * RandomHadamard.shape(k)[0] * k + 64 * k

    def check(self, context: Context) -> None:
        if not _turned(context):
            raise RecipeError(
                "rotation turns the channels of linear layers, and this recipe quantizes none that it can "
                "turn; leave it out"
            )

    def prepare(self, context: Context) -> None:
        groups = _turned(context)
        moments = context.channel_moments([group[0].site for group in groups.values()])
        centred = scaled = 0
        for key, group in groups.items():
            found, means, factors = self._transforms(context.seed, key, group, moments.get(key))
            centred, scaled = centred + means, scaled + factors
            for state in group:
                state.transforms = found
                if self.chosen.clip and state.plan.weight_bits <= 4:
                    state.plan = dataclasses.replace(state.plan, weight_observer="mse")
        context.notes["rotation"] = {
            "inputs": len(groups),
            "channels_centred": centred,
            "channels_scaled": scaled,
        }

    def _transforms(
        self, seed: int, key: str, group: list[SiteState], moments: calibration.Moments | None
    ) -> tuple[list[Transform], int, int]:
        """For sites that share an input; and how many channels are centred and scaled. Without `moments`, where no
        sample reaches the input, it is rotated as it is."""
        weights = torch.cat([state.folded()[0] for state in group])
        transforms = list(group[0].transforms)
        centred = scaled = 0
        if moments is not None:
            shift, factor = balanced(moments, weights, self.chosen.outlying)
            centred, scaled = int((shift != 0).sum()), int((factor != 1).sum())
            transforms += [Shift(shift)] * (centred > 0) + [Scale(factor)] * (scaled > 0)
        rotation = RandomHadamard.drawn(weights.shape[1], generator(seed, f"rotation of {key}"))
        return [*transforms, rotation.to(weights.device)], centred, scaled


def balanced(moments: calibration.Moments, weights: Tensor, outlying: float) -> tuple[Tensor, Tensor]:
    """Shift and positive scale of every channel, float32 `[K]`; 0 and 1 for channels that do not lie out.

    Channel j of size x_j (root mean square) is scaled by `sqrt((w_j / x_j) / (w / x))`, w_j the root mean square of the
    weights `[N, K]` that read it, w and x the medians: it is then as many times the usual in the input as in the
    weight, which is where the product of both norms is least. What a factor on the input and its inverse on the weight
    have changed cancels.
    """
    mean, deviation = moments.mean.to(weights), moments.deviation.to(weights)
    usual = (mean.square() + deviation.square()).sqrt().median()
    shift = torch.where(mean.abs() > outlying * usual, mean, 0)
    size = ((mean - shift).square() + deviation.square()).sqrt()
    read = weights.square().mean(0).sqrt()
    if not usual > 0:  # more than half of the channels are dead
        return torch.zeros_like(mean), torch.ones_like(mean)
    common = read.median() / size.median()
    wanted = (read / size / common).sqrt().clamp(min=UNREAD)
    out = (size > outlying * usual) & wanted.isfinite()
    return shift, torch.where(out, wanted, 1)


def _turned(context: Context) -> dict[str, list[SiteState]]:
    """The sites that it can turn, by `site.shared`."""
    groups: dict[str, list[SiteState]] = {}
    for state in context.states.values():
        if state.site.kind != "embedding" and not isinstance(state.source, nn.Conv2d):
            groups.setdefault(state.site.shared, []).append(state)
    return groups
