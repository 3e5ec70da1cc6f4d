"""White noise whose norm is the residual's over the whole layer."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..change import Change
from . import Control, normal


class WhiteLayer(Control):
    """As `White`, without the residual's distribution over output channels."""

    name, label = "white_layer", "white noise of equal norm per layer"
    excludes = frozenset({"level", "shape"})

    def residual(self, change: Change, draw: np.random.Generator) -> Tensor:
        drawn = normal(change.shape, draw)
        return drawn.mul_(float(change.residual.norm() / drawn.norm()))
