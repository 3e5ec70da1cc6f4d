"""One weight before and after quantization, on the float weight's basis."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

from torch import Tensor

from .bands import bands
from .basis import Basis


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """The float weight is U S V'; `residual` is E `[N, K]` float64, what quantization added to it. `from_steps` turns
    units `[N, K]` of the grid's real steps into what they add to the weight; None where the layer tells no steps."""

    site: str
    basis: Basis
    residual: Tensor
    from_steps: Callable[[Tensor], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.residual.shape[0], self.residual.shape[1]

    @property
    def weight(self) -> Tensor:
        """The float weight, float64 `[N, K]`."""
        return (self.basis.u * self.basis.s) @ self.basis.v.mT

    @functools.cached_property
    def _residual_v(self) -> Tensor:
        return self.residual @ self.basis.v

    @functools.cached_property
    def shift(self) -> Tensor:
        """M_ii - sigma_i = u_i' E v_i, float64 `[r]`."""
        return (self.basis.u * self._residual_v).sum(0)

    @functools.cached_property
    def noise(self) -> Tensor:
        """|E v_i|^2, float64 `[r]`."""
        return (self._residual_v**2).sum(0)

    @functools.cached_property
    def white_noise(self) -> float:
        """What `noise` is on average over white residuals of E's norm in every output channel: |E|^2 / K at every rank,
        since a direction of a Gaussian row prefers none of the K."""
        return float((self.residual**2).sum()) / self.shape[1]

    @functools.cached_property
    def gains(self) -> dict[str, float]:
        return self.basis.gains(self.shift)

    def sqnr(self, ranks: slice) -> float:
        """sum(sigma_i^2) / sum(|E v_i|^2) over the ranks, in dB."""
        return _decibel(float((self.basis.s[ranks] ** 2).sum()), float(self.noise[ranks].sum()))

    def white_sqnr(self, ranks: slice) -> float:
        """The same for the noise of white residuals, in expectation."""
        return _decibel(float((self.basis.s[ranks] ** 2).sum()), self.white_noise * (ranks.stop - ranks.start))

    def removed(self) -> dict[str, float]:
        """Share of each band's energy that is gone on the float basis: 1 - sum(M_ii^2) / sum(sigma_i^2); below 0 where
        energy was added."""
        ranks = bands(len(self.basis.s))
        kept = (self.basis.s + self.shift) ** 2
        return {name: 1 - float(kept[ranks[name]].sum()) / energy for name, energy in self.basis.energy.items()}


def _decibel(signal: float, noise: float) -> float:
    if signal <= 0 or noise <= 0:
        return math.inf if noise <= 0 < signal else -math.inf
    return 10 * math.log10(signal / noise)
