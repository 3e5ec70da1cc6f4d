"""The float weight without its last ranks: true filtering of equal norm."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..change import Change
from . import Control


class Truncated(Control):
    """The smallest singular values are 0, as many as have the energy |E|^2; the last of them is lowered by what is left
    of it. It excludes nothing: it shows what a filter of this size does."""

    name, label = "truncated", "truncated SVD of equal energy"
    random = False
    excludes = frozenset()

    def shift(self, change: Change) -> Tensor:
        """What is added to each singular value, float64 `[r]`."""
        s, budget = change.basis.s, float((change.residual**2).sum())
        behind = (s**2).flip(0).cumsum(0).flip(0)  # energy from each rank on
        lost = torch.where(behind <= budget, s, torch.zeros_like(s))
        whole = int((behind > budget).sum())
        if whole:  # the last rank that stays gives what the budget has left
            lost[whole - 1] = (budget - float((lost**2).sum())) ** 0.5
        return -lost

    def residual(self, change: Change, draw: np.random.Generator) -> Tensor:
        return (change.basis.u * self.shift(change)) @ change.basis.v.mT

    def gains(self, change: Change, draw: np.random.Generator) -> dict[str, float]:
        return change.basis.gains(self.shift(change))
