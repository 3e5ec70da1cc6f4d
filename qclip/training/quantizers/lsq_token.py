"""LSQ with a range for each token, found in each call, times one learned share for the site: codes cover that share of
it. Where few bits must hold many values that is better than both all of it, since few values need the outer codes, and
one scale for all tokens. Inputs have a zero point for each token, which costs nothing that is not simulated anyway.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

import qkernels
from qkernels.grids import dynamic_scales

from ...layers.activations import ASYM, SYM, code_range, quantize_dequantize
from ...layers.simulated import LEAST_SHARE
from ...ptq.base import SiteState
from ...recipes import Treatment
from ..quantizer import InputRounding, LearnedScale
from .lsq import LSQ

MOST_BITS = 7  # kernels cover all of a token at 8 bits, where a share would gain nothing
TOKENS, CHANNELS = 512, 256  # normal values on which the first share is found; it depends little on how many


@functools.cache
def normal_share(bits: int, grid: str) -> float:
    """The share, in steps of 1/50, with the least squared error for tokens of normal values."""
    x = torch.randn(TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    shares = [step / 50 for step in range(10, 51)]
    errors = [float((quantize_dequantize(x, bits, grid=grid, share=each) - x).square().mean()) for each in shares]
    return shares[errors.index(min(errors))]


class SharedInput(InputRounding):
    """A token's own range times a learned share, at most 1."""

    def __init__(self, plan: Treatment, values: int) -> None:
        super().__init__(plan)
        self.low, self.high = code_range(plan.activation_bits, plan.activation_grid)
        self.learned = LearnedScale()
        self.learned.start(torch.tensor(normal_share(plan.activation_bits, plan.activation_grid)))
        self.step = 1 / math.sqrt(values * self.high)

    def share(self) -> Tensor:
        return self.learned().clamp(LEAST_SHARE, 1.0)

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of each token `[..., 1]`: what the share is multiplied with, and the zero point."""
        low, high = torch.aminmax(x.detach(), dim=-1, keepdim=True)
        if self.plan.activation_grid == SYM:
            return dynamic_scales(torch.maximum(high, -low), self.high)[0], None
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale, inverse = dynamic_scales(high - low, self.high - self.low)
        return scale, (self.low - (low * inverse).round()).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.scales(x)
        return qkernels.fake_quantize(
            x, self.share() * scale, zero, self.low, self.high, "lsq", group=x.shape[-1], grad_scale=self.step
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
        grid = ASYM if plan.activation_bits <= MOST_BITS else SYM
        return dataclasses.replace(plan, weight_observer="mse", activation_grid=grid)

    def input(self, plan: Treatment, values: int) -> InputRounding:
        if plan.static or plan.activation_bits > MOST_BITS:
            return super().input(plan, values)
        return SharedInput(plan, values)
