"""White noise whose norm is the residual's in every output channel."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..change import Change
from . import Control


class White(Control):
    """Excludes that any perturbation of this size does it: white noise alone lowers the signal to noise ratio as
    sigma_i^2."""

    name, label = "white", "white noise of equal norm"
    excludes = frozenset({"level", "shape"})

    def residual(self, change: Change, draw: np.random.Generator) -> Tensor:
        drawn = torch.from_numpy(draw.standard_normal(change.shape, np.float32))
        norms = change.residual.norm(dim=1, keepdim=True).float()
        return drawn * (norms / drawn.norm(dim=1, keepdim=True))
