"""Float continuation, the control of every trained recipe: what the same steps do where nothing is rounded."""

from __future__ import annotations

from torch import Tensor

from ...recipes import Treatment
from ..quantizer import InputRounding, Quantizer, WeightRounding


class FloatWeight(WeightRounding):
    """The weight as it is."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def deployed(self, weight: Tensor) -> Tensor:
        return weight.detach()


class FloatInput(InputRounding):
    """The input as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Continued(Quantizer):
    """Nothing is rounded: the float model learns on, as a control of what training does by itself"""

    name = "continued"
    rounds = False

    def weight(self, weight: Tensor, plan: Treatment) -> WeightRounding:
        return FloatWeight(weight, plan)

    def input(self, plan: Treatment, values: int) -> InputRounding:
        return FloatInput(plan)
