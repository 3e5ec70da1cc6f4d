"""Where papers start the scales that are learned (docs/methods.md, Quantizers of training). Ours start at the least
squared error, which a recipe's `"scale_start": "paper"` changes, to compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qkernels.contract import TINY

ScaleStart = Literal["mse", "paper"]
PACT_BOUND = 10.0  # a wide one, which its decay makes smaller


@dataclasses.dataclass(frozen=True)
class Options:
    """`scale_start`: where learned scales begin, at the least squared error ("mse") or where the paper has them."""

    scale_start: ScaleStart = "mse"


class Spread(NamedTuple):
    """Of the values that share a scale, each a tensor of the scales' shape; and the codes `low .. high` for them, of
    which `zero` stands for 0."""

    mean: Tensor
    mean_abs: Tensor
    std: Tensor
    low: int
    high: int
    zero: float

    @property
    def codes(self) -> int:
        return self.high - self.low + 1

    @property
    def above(self) -> float:
        """How many codes are above 0."""
        return max(self.high - self.zero, 1)


Start = Callable[[Spread], Tensor]


class Paper(NamedTuple):
    """Where a paper starts scales of weights and of inputs; None: where ours start, or it has none."""

    weight: Start | None = None
    input: Start | None = None


def scales(paper: Start, spread: Spread) -> Tensor:
    """Float32, none of which is 0."""
    return paper(spread).clamp(min=TINY).float()


def lsq(x: Spread) -> Tensor:
    """Esser et al. 2019, section 2.1: `2 mean|x| / sqrt(Qp)`."""
    return 2 * x.mean_abs / math.sqrt(x.above)


def lsq_plus(x: Spread) -> Tensor:
    """Of weights (Bhalgat et al. 2020, section 3.2): three standard deviations on the side that has more."""
    return torch.maximum((x.mean - 3 * x.std).abs(), (x.mean + 3 * x.std).abs()) / (x.codes / 2)


def pact(x: Spread) -> Tensor:
    return torch.full_like(x.std, PACT_BOUND / x.above)


def dorefa(x: Spread) -> Tensor:
    """Zhou et al. 2016: inputs are clipped at 1."""
    return torch.full_like(x.std, 1 / x.above)


def ewgs_weight(x: Spread) -> Tensor:
    """Lee et al. 2021, by its code: three standard deviations on either side."""
    return 6 * x.std / (x.codes - 1)


def ewgs_input(x: Spread) -> Tensor:
    """The same, of a normal distribution of which the positive half is seen."""
    return 3 * x.std / math.sqrt(1 - 2 / math.pi) / x.above


def ofq_input(x: Spread) -> Tensor:
    """Liu et al. 2023, by its code: twice LSQ's."""
    return 2 * lsq(x)


class Seen:
    """Moments of inputs as they come by, float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        x = x.detach().double().cpu()
        self.count += x.numel()
        self.sums += torch.stack([x.sum(), x.abs().sum(), x.square().sum()])

    def spread(self, low: int, high: int, zero: float) -> Spread:
        mean, mean_abs, square = (self.sums / max(self.count, 1)).unbind()
        return Spread(mean, mean_abs, (square - mean.square()).clamp(min=0).sqrt(), low, high, zero)


def spread_of(weight: Tensor, group: int, low: int, high: int, zero: float) -> Spread:
    """Of every group of inputs of every output of a weight `[N, K]`: `[N, groups]`."""
    parts = [part.double() for part in weight.detach().split(group, dim=1)]
    mean = torch.stack([part.mean(1) for part in parts], dim=1)
    mean_abs = torch.stack([part.abs().mean(1) for part in parts], dim=1)
    std = torch.stack([part.std(1, correction=0) for part in parts], dim=1)
    return Spread(mean, mean_abs, std, low, high, zero)
