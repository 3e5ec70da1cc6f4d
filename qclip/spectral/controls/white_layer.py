"""White noise whose norm is the residual's over the whole layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..change import Change
from . import Control


class WhiteLayer(Control):
    """As `White`, without the residual's distribution over output channels."""

    name, label = "white_layer", "white noise of equal norm per layer"
    excludes = frozenset({"level", "shape"})

    def residual(self, change: Change, draw: np.random.Generator) -> Tensor:
        drawn = torch.from_numpy(draw.standard_normal(change.shape, np.float32))
        return drawn * float(change.residual.norm() / drawn.norm())
