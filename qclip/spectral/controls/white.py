"""White noise whose norm is the residual's in every output channel."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..change import Change
from . import Control, normal


class White(Control):
    """Excludes that any perturbation of this size does it: white noise alone lowers the signal to noise ratio as
    sigma_i^2."""

    name, label = "white", "white noise of equal norm"
    excludes = frozenset({"level", "shape"})

    def residual(self, change: Change, draw: np.random.Generator) -> Tensor:
        drawn = normal(change.shape, draw)
        norms = change.residual.norm(dim=1, keepdim=True).float()
        return drawn.mul_(norms / drawn.norm(dim=1, keepdim=True))
