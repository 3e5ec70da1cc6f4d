"""What is kept of the inputs of a site while samples run: maxima of channels, or the range of the whole tensor.

An observer of ranges is updated batch by batch, and then says which range the codes of a treatment should cover.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

import qkernels

from ..layers.activations import SYM, code_range, quantize_dequantize, static_quantizer
from ..recipes import Treatment

Quantizer = tuple[Tensor, Tensor | None]  # scale float32 [], zero point int32 [] or None


class AbsMax:
    """Largest |x| of every input channel: float32 `[K]`."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if self.value is None:
            self.value = torch.zeros(x.shape[-1], device=x.device)
        qkernels.channel_absmax(x.detach(), running=self.value)


class Moments:
    """Mean and standard deviation of every input channel, float64 `[K]`; sums around the first batch's mean, so that an
    offset costs no digits."""

    def __init__(self) -> None:
        self.rows = 0
        self.about = self.sums = self.squares = torch.zeros(())

    def update(self, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).double()
        if self.rows == 0 and len(x):
            self.about = x.mean(0)
            self.sums, self.squares = torch.zeros_like(self.about), torch.zeros_like(self.about)
        off = x - self.about
        self.sums, self.squares = self.sums + off.sum(0), self.squares + off.square().sum(0)
        self.rows += len(x)

    @property
    def mean(self) -> Tensor:
        return self.about + self.sums / max(self.rows, 1)

    @property
    def deviation(self) -> Tensor:
        return (self.squares / max(self.rows, 1) - (self.sums / max(self.rows, 1)).square()).clamp(min=0).sqrt()


class Observer:
    """Watches inputs. `finite`: none of them held NaN or Inf; `seen`: there were some."""

    name: ClassVar[str]  # a treatment's `activation_observer`

    def __init__(self) -> None:
        self.finite, self.seen = True, False

    def update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        x = x.detach().float().flatten()
        low, high = (float(v) for v in torch.aminmax(x))
        if not (np.isfinite(low) and np.isfinite(high)):
            self.finite = False
            return
        self._see(x, low, high)
        self.seen = True

    def _see(self, x: Tensor, low: float, high: float) -> None:
        """One batch, flat float32, and its least and largest value."""
        raise NotImplementedError

    def span(self, plan: Treatment) -> tuple[float, float]:
        """The range that the codes of `plan` should cover."""
        raise NotImplementedError

    def quantizer(self, plan: Treatment) -> Quantizer:
        """Static scale, and zero point where the grid has one, as a layer holds them."""
        return static_quantizer(*self.span(plan), plan.activation_bits, plan.activation_grid)


class MinMax(Observer):
    """The least and the largest value of all batches."""

    name = "min-max"
    low = high = 0.0

    def _see(self, x: Tensor, low: float, high: float) -> None:
        self.low = min(self.low, low) if self.seen else low
        self.high = max(self.high, high) if self.seen else high

    def span(self, plan: Treatment) -> tuple[float, float]:
        return self.low, self.high


class Ema(MinMax):
    """`m + c (x - m)` of the batches' least and largest values, from the first batch on. It forgets: the range depends
    on the order of batches and on their size. c = 0.1, not the usual 0.01, with which ten batches would be the first
    one."""

    name = "ema"
    SHARE = 0.1

    def _see(self, x: Tensor, low: float, high: float) -> None:
        self.low = self.low + self.SHARE * (low - self.low) if self.seen else low
        self.high = self.high + self.SHARE * (high - self.high) if self.seen else high


class Histogram(MinMax):
    """x in 2,048 bins on each side of 0, besides its exact ends; the range doubles by merging bins, so that batches do
    not matter. Memory does not grow."""

    BINS = 2048

    def __init__(self) -> None:
        super().__init__()
        self.above = torch.zeros(self.BINS, dtype=torch.float64)  # counts of x >= 0, from 0 up to `top`
        self.below = torch.zeros(self.BINS, dtype=torch.float64)  # of x < 0, from 0 down to -`top`
        self.top = 0.0

    def _see(self, x: Tensor, low: float, high: float) -> None:
        super()._see(x, low, high)
        if (peak := max(high, -low)) == 0.0:
            self.above[0] += x.numel()
            return
        if self.top == 0.0:  # a power of two, so that ranges found in any order are multiples of each other
            self.top = 2.0 ** np.ceil(np.log2(peak))
        while peak > self.top:
            self.above, self.below = _wider(self.above), _wider(self.below)
            self.top *= 2
        x = x.double() if self.top > 2.0**127 else x  # float32 ends before the next power of two
        for part in x.cpu().split(1 << 22):  # histc counts in its dtype
            self.above += torch.histc(part, self.BINS, 0.0, self.top).double()  # leaves out what lies outside
            if low < 0:
                self.below += torch.histc(-part, self.BINS, 0.0, self.top).double()
                self.below[0] -= int((part == 0).sum())

    @property
    def width(self) -> float:
        """Of a bin."""
        return self.top / self.BINS

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """Centres and counts of the bins of |x|."""
        return (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * self.width, self.above + self.below

    def values(self) -> tuple[Tensor, Tensor]:
        """Centres and counts of the bins of x, from the least to the largest."""
        centres, _ = self.magnitudes()
        return torch.cat([-centres.flip(0), centres]), torch.cat([self.below.flip(0), self.above])

    def span(self, plan: Treatment) -> tuple[float, float]:
        return self.percentiles(plan) if plan.activation_observer == "percentile" else self.least_squares(plan)

    def percentiles(self, plan: Treatment, percentile: float | None = None) -> tuple[float, float]:
        """That of |x| where the grid is sym; else one at each end. Within a bin of the exact ones."""
        percentile = plan.activation_percentile if percentile is None else percentile
        if plan.activation_grid == SYM:
            top = min(_percentile(*self.magnitudes(), self.width, percentile), max(self.high, -self.low))
            return -top, top
        centres, counts = self.values()
        low = _percentile(centres, counts, self.width, 100 - percentile)
        high = _percentile(centres, counts, self.width, percentile)
        return max(low, self.low), min(high, self.high)

    def least_squares(self, plan: Treatment, steps: int = 100) -> tuple[float, float]:
        """Of `steps` ranges, the whole one and narrower ones, that with the least squared error of bin centres."""
        if self.top == 0.0:
            return 0.0, 0.0
        bits, grid = plan.activation_bits, plan.activation_grid
        if grid == SYM:
            centres, counts = self.magnitudes()
            top = (int(counts.nonzero().max()) + 1) * self.width
            ends = -top, top
        else:
            centres, counts = self.values()
            ends = min(self.low, 0.0), max(self.high, 0.0)
        tried = [(ends[0] * part, ends[1] * part) for part in (1 - i / (steps * 1.25) for i in range(steps))]
        return min(tried, key=lambda span: squared_error(centres, counts, span, bits, grid))

    def mean_squared_error(self, span: tuple[float, float], plan: Treatment) -> float:
        """Of the values that it saw, by bins, on the codes of `plan` that cover `span`."""
        centres, counts = self.values()
        return squared_error(centres, counts, span, plan.activation_bits, plan.activation_grid) / float(counts.sum())


def squared_error(centres: Tensor, counts: Tensor, span: tuple[float, float], bits: int, grid: str) -> float:
    """`sum counts (x - Q(x))^2` of the values `centres` on codes that cover `span`; in float64, as bins are few."""
    least, most = code_range(bits, grid)
    if grid == SYM:
        scale = max(span[1], -span[0]) / most
        off = centres - torch.round(centres / scale).clamp(least, most) * scale
    else:
        step, zero = static_quantizer(*span, bits, grid)
        off = centres - quantize_dequantize(centres, bits, step, zero)
    return float((counts * off * off).sum())


def _wider(counts: Tensor) -> Tensor:
    """The same counts in bins of twice the width."""
    merged = counts.reshape(-1, 2).sum(1)
    return torch.cat([merged, torch.zeros_like(merged)])


def _percentile(centres: Tensor, counts: Tensor, width: float, percentile: float) -> float:
    """Of values in bins, spread evenly within each."""
    reached = counts.cumsum(0)
    wanted = percentile / 100 * float(reached[-1])
    at = min(int(torch.searchsorted(reached, wanted)), len(counts) - 1)
    inside = (wanted - float(reached[at] - counts[at])) / max(float(counts[at]), 1.0)
    return float(centres[at]) + (inside - 0.5) * width


#: By the name that a treatment calls them.
OBSERVERS: dict[str, type[Observer]] = {"min-max": MinMax, "ema": Ema, "percentile": Histogram, "mse": Histogram}


def static_input(inputs: Iterable[Tensor], plan: Treatment) -> Quantizer:
    """The static quantizer of these inputs, batch by batch, by the observer of `plan`."""
    observer = OBSERVERS[plan.activation_observer]()
    for x in inputs:
        observer.update(x)
    return observer.quantizer(plan)
