"""The module that stands for a site while a model learns: float parameters, rounded in each call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import QclipError
from ..layers.site import Description
from ..layers.transforms import transformed, unfolded
from ..ptq.base import SiteState
from ..recipes import FLOAT, Treatment
from .quantizer import InputRounding, WeightRounding


class RoundingError(QclipError):
    """A weight that its grid cannot hold any more."""


class TrainedSite(nn.Module):
    """`weight` `[N, K]`, which begins as given, and `bias` act on the input behind the state's transforms, which are
    not trained. `rounds`: whether weight and input are rounded; a model may begin to learn without. `held`: the
    rounded weight of this step, where the trainer rounds once for several calls."""

    def __init__(
        self,
        state: SiteState,
        weight: Tensor,
        rounding: WeightRounding,
        input_rounding: InputRounding | None,
    ) -> None:
        super().__init__()
        self.name = state.site.name
        bias = state.folded()[1]
        learns = bool(state.source.weight.requires_grad)  # type: ignore[union-attr]
        self.weight = nn.Parameter(weight.clone(), requires_grad=learns)
        self.bias = None if bias is None else nn.Parameter(bias.float().clone(), requires_grad=learns)
        self.transforms: Any = nn.ModuleList(state.transforms) if state.transforms else ()
        self.rounding, self.input_rounding = rounding, input_rounding
        self.shape = (weight.shape[0], weight.shape[1])
        self.rounds = True
        self.held: Tensor | None = None

    @property
    def plan(self) -> Treatment:
        return self.rounding.plan

    def rounded(self) -> Tensor:
        """The weight that a call multiplies by, float32 `[N, K]`. Raises RoundingError."""
        with self._told():
            return self.rounding(self.weight) if self.rounds else self.weight

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except ValueError as why:
            raise RoundingError(f"the weight of {self.name} can be rounded no more: {why}") from None

    def input(self, x: Tensor) -> Tensor:
        """The transformed input, which is what gets rounded."""
        return transformed(x, self.transforms)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        if self.rounds and self.input_rounding is not None:
            x = self.input_rounding(x.float())  # in bfloat16 codes beyond 64 would not be whole
        return F.linear(x, self.rounded() if self.held is None else self.held, self.bias)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """`x @ model.visual.proj`, which is a parameter in open_clip's own model."""
        return self(x)  # type: ignore[no-any-return]

    def decide(self, state: SiteState) -> None:
        """Write into the state what a layer needs to give the same numbers. Raises RoundingError."""
        with self._told():
            state.weight = self.rounding.quantized(self.weight.detach())
        if self.input_rounding is not None:
            self.input_rounding.decide(state, self.shape[1])

    def describe(self) -> Description:
        bits = self.plan.activation_bits
        return Description(self.shape, "simulated", self.plan.weight_bits, None if bits == FLOAT else bits)

    @torch.no_grad()
    def dequantized_weight(self) -> Tensor:
        """The rounded weight to the input as it comes, before the transforms."""
        return unfolded(self.rounding.deployed(self.weight), self.bias, self.transforms)[0]

    @torch.no_grad()
    def dequantized(self) -> nn.Module:
        """The float module that computes with that weight."""
        weight, bias = unfolded(self.rounding.deployed(self.weight), self.bias, self.transforms)
        module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        module.weight = nn.Parameter(weight.clone())
        if bias is not None:
            module.bias = nn.Parameter(bias.float().clone())
        return module.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, {self.plan.grid}, rounds={self.rounds}"
