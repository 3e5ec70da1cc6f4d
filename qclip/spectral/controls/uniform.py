"""Uniform noise of the real step, without rounding and without clipping."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..change import Change
from . import Control, uniform


class Uniform(Control):
    """U(-D/2, D/2) with the step D that each value of the weight has on its grid, behind the site's transforms.
    Excludes that rounding's determinism, or clipping, matters."""

    name, label = "uniform", "uniform noise of the real step"
    excludes = frozenset({"level", "shape"})

    def fits(self, change: Change) -> bool:
        return change.from_steps is not None

    def residual(self, change: Change, draw: np.random.Generator) -> Tensor:
        assert change.from_steps is not None
        return change.from_steps(uniform(change.shape, draw).sub_(0.5))
