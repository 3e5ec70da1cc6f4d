"""The residual with its ranks exchanged at random."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..change import Change
from . import Control


class Shuffled(Control):
    """U P (M - S) P' V' with M = U' W^ V and a random permutation P; what of E lies outside the space of the singular
    vectors stays. Excludes that it matters how the error is aligned with rank."""

    name, label = "shuffled", "residual with shuffled ranks"

    def _order(self, change: Change, draw: np.random.Generator) -> Tensor:
        return torch.from_numpy(draw.permutation(len(change.basis.s)))

    def residual(self, change: Change, draw: np.random.Generator) -> Tensor:
        basis, order = change.basis, self._order(change, draw)
        inner = basis.u.mT @ change.residual @ basis.v
        return change.residual + basis.u @ (inner[order][:, order] - inner) @ basis.v.mT

    def gains(self, change: Change, draw: np.random.Generator) -> dict[str, float]:
        return change.basis.gains(change.shift[self._order(change, draw)])
