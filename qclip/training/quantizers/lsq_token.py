"""LSQ with a scale for each token, as the kernels find it in each call, times one learned share for the site: codes
cover that share of the token's largest value. Where few bits must hold many values that is better than both all of it,
since few values need the outer codes, and one scale for all tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

import qkernels

from ...layers.activations import SYM, code_range, quantize_dequantize
from ...layers.simulated import LEAST_SHARE
from ...ptq.base import SiteState
from ...recipes import Treatment
from ..quantizer import InputRounding, LearnedScale, WeightRounding
from .lsq import LSQ, LearnedWeight

MOST_BITS = 7  # kernels cover all of a token at 8 bits, where a share would gain nothing
TOKENS, CHANNELS = 512, 256  # normal values on which the first share is found; it depends little on how many


@functools.cache
def normal_share(bits: int) -> float:
    """The share, in steps of 1/50, with the least squared error for tokens of normal values."""
    x = torch.randn(TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    shares = [step / 50 for step in range(10, 51)]
    errors = [float((quantize_dequantize(x, bits, share=share) - x).square().mean()) for share in shares]
    return shares[errors.index(min(errors))]


class SharedInput(InputRounding):
    """A token's own scale times a learned share, at most 1."""

    def __init__(self, plan: Treatment, values: int) -> None:
        super().__init__(plan)
        self.low, self.high = code_range(plan.activation_bits, SYM)
        self.learned = LearnedScale()
        self.learned.start(torch.tensor(normal_share(plan.activation_bits)))
        self.step = 1 / math.sqrt(values * self.high)

    def share(self) -> Tensor:
        return self.learned().clamp(LEAST_SHARE, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        top = x.detach().abs().amax(-1, keepdim=True)
        scale = torch.where(top > 0, self.share() * top / self.high, 1.0)
        return qkernels.fake_quantize(
            x, scale, None, self.low, self.high, "lsq", group=x.shape[-1], grad_scale=self.step
        )

    def decide(self, state: SiteState, width: int) -> None:
        state.input_share = float(self.share().detach())

    def fault(self) -> str:
        return self.learned.fault()


class LSQToken(LSQ):
    """Learned scales of weights, and a learned share of each token's range"""

    name = "lsq-token"

    @classmethod
    def treatment(cls, plan: Treatment) -> Treatment:
        return dataclasses.replace(plan, weight_observer="mse")

    def weight(self, weight: Tensor, plan: Treatment) -> WeightRounding:
        return LearnedWeight(weight, plan)

    def input(self, plan: Treatment, values: int) -> InputRounding:
        if plan.static or plan.activation_bits > MOST_BITS or plan.activation_grid != SYM:
            return super().input(plan, values)
        return SharedInput(plan, values)
