"""What methods need to know of a site's inputs: first and second moments of what its weight is multiplied by."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ..layers.activations import quantize_dequantize
from ..recipes import FLOAT
from .base import SiteState

OTHERS = 0.1  # weight of the rows that nobody reads beside those that are read, where these are few


@dataclasses.dataclass(frozen=True)
class Moments:
    """Over `rows` inputs of a site, behind its transforms (`seen`) and behind its quantizer (`multiplied`)."""

    hessian: Tensor  # 2/n sum x xT of what is multiplied: float32 [K, K]
    seen: Tensor  # mean, float32 [K]
    multiplied: Tensor  # mean, float32 [K]
    rows: int


class Sums:
    """Adds batches up to `Moments`. Rows that are read by what follows count; where these are one per image, their
    Hessian alone would have too few directions, so the others enter with the weight `OTHERS`."""

    def __init__(self, state: SiteState) -> None:
        self.state = state
        self._sums: dict[bool, list[Tensor]] = {}
        self._rows = {True: 0, False: 0}

    def add(self, x: Tensor, read: Tensor | None = None) -> None:
        """Inputs `[n, K]` as they come; `read` bool `[n]`: which of them count (None: all)."""
        seen = self.state.input(x).float()
        used = multiplied(seen, self.state)
        for counts, rows in ((True, slice(None)),) if read is None else ((True, read), (False, slice(None))):
            part, other = used[rows], seen[rows]
            sums = [part.T @ part, other.sum(0), part.sum(0)]
            before = self._sums.get(counts)
            self._sums[counts] = sums if before is None else [a.add_(b) for a, b in zip(before, sums, strict=True)]
            self._rows[counts] += len(part)

    def moments(self) -> Moments | None:
        """None where nothing was added."""
        if self._rows[True] == 0:
            return None
        means = [total / self._rows[True] for total in self._sums[True]]
        if self._rows[False]:
            others = [total / self._rows[False] for total in self._sums[False]]
            means = [(1 - OTHERS) * a + OTHERS * b for a, b in zip(means, others, strict=True)]
        return Moments(2 * means[0], means[1], means[2], self._rows[False] or self._rows[True])


def multiplied(x: Tensor, state: SiteState) -> Tensor:
    """A transformed input as the kernels multiply it; a static scale that nobody has found yet changes nothing."""
    bits = state.plan.activation_bits
    if bits == FLOAT or (state.plan.static and state.input_scale is None):
        return x
    return quantize_dequantize(x, bits, state.input_scale, state.input_zero, state.plan.activation_grid)
