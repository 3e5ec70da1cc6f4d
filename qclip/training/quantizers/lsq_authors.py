"""The quantizer that the authors of "Less Precise Can Be More Reliable" published with a later study (2509.21173;
CEA-LIST, Quantization-and-Corruption-Robustness): weight scales of the data and never learned, one linear scale of each
input learned as LSQ does. Their codes go down to -2^(b-1), which no kernel here has for inputs: one less.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import qkernels

from ...layers.activations import code_range
from ...ptq.base import SiteState
from ...recipes import FLOAT, Treatment
from ..quantizer import InputRounding
from .ste import STE, SYM, decide_static

LEAST = 1e-8  # below it a scale has no gradient


class LinearInput(InputRounding):
    """A learned scale, as it is: its gradient is divided by the root of all values of the call, the batch's too."""

    def __init__(self, plan: Treatment) -> None:
        super().__init__(plan)
        self.low, self.high = code_range(plan.activation_bits, plan.activation_grid)
        self.scale = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def start(self, scale: Tensor, zero: Tensor | None) -> None:
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        scale, step = self.scale.clamp(min=LEAST), 1 / math.sqrt(max(x.numel(), 1) * self.high)
        return qkernels.fake_quantize(x, scale, None, self.low, self.high, "lsq", grad_scale=step)

    def decide(self, state: SiteState, width: int) -> None:
        decide_static(state, self.plan, self.scale.detach().clamp(min=LEAST), torch.zeros(()))

    def fault(self) -> str:
        return f"a scale has fallen to {LEAST:g}, where it has no gradient" if float(self.scale) <= LEAST else ""


class LSQAuthors(STE):
    """As the paper's authors published it: absmax weights, learned linear scales of static inputs"""

    name = "lsq-authors"
    settings: ClassVar[dict[str, Any]] = {"rate": 1e-5, "scale_rate": 1e-4, "logit_scale": "tuned"}

    @classmethod
    def treatment(cls, plan: Treatment) -> Treatment:
        static = plan.activation_bits != FLOAT
        observer = "ema" if static else plan.activation_observer
        return dataclasses.replace(plan, static=static, group=None, weight_grid=SYM, activation_observer=observer)

    def static_input(self, plan: Treatment, values: int) -> InputRounding:
        return LinearInput(plan)
