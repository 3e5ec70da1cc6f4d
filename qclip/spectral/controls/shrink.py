"""The float weight times one number: the energy that was lost, lost in every rank alike."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ..change import Change
from . import Control


class Shrink(Control):
    """c W with the energy that W^ has on the float basis, c^2 = sum(M_ii^2) / sum(sigma_i^2): excludes that it matters
    that energy is lost, not where."""

    name, label = "shrink", "uniform shrink of equal energy"
    random = False

    def factor(self, change: Change) -> float:
        kept = float(((change.basis.s + change.shift) ** 2).sum())
        return math.sqrt(kept / float((change.basis.s**2).sum()))

    def residual(self, change: Change, draw: np.random.Generator) -> Tensor:
        basis = change.basis
        return (basis.u * (basis.s * (self.factor(change) - 1))) @ basis.v.mT

    def gains(self, change: Change, draw: np.random.Generator) -> dict[str, float]:
        return dict.fromkeys(change.basis.energy, self.factor(change))
