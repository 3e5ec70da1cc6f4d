"""The granularity of `fake_quantize`: how the values of a tensor share scales, as every backend walks over them, and
which of its arguments have gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import LEARNED_SCALE, OFFSET


class Granularity(NamedTuple):
    """How values share scales, in the order of memory. Neighbours with one scale make a run; run i uses scale
    `i % scales`. Per tensor there is one run. With a scale for every column of a matrix each value is a run."""

    runs: int
    length: int  # values of a run
    period: int  # every period-th run, the last group of a row, may be shorter
    last: int  # values of that one
    scales: int

    @property
    def by_columns(self) -> bool:
        return self.length == 1 and self.scales > 1


def granularity(x: Tensor, scale: Tensor, axis: int | None, group: int | None) -> Granularity:
    """Of a contiguous x with at least one value; `axis` and `group` as `qkernels.ops.fake_quantize` normalises them."""
    if group is not None:
        period = scale.shape[-1]
        last = x.shape[-1] - (period - 1) * group
        if period == 1 or last == group:
            return Granularity(scale.numel(), last, 1, last, scale.numel())
        return Granularity(scale.numel(), group, period, last, scale.numel())
    if axis is None or x.shape[axis] == 1:
        return Granularity(1, x.numel(), 1, x.numel(), 1)
    length = x.shape[axis + 1 :].numel()
    return Granularity(x.shape[: axis + 1].numel(), length, 1, length, scale.numel())


def learned(zero_point: Tensor | None, estimator: str) -> tuple[bool, bool]:
    """Whether the estimator gives the scale a gradient, and the offset."""
    return estimator in LEARNED_SCALE, estimator in OFFSET and zero_point is not None


def new_gradients(x: Tensor, scale: Tensor, has: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the results of `fake_quantize_backward`: of x, the scale and the offset; (0,) where there is none."""
    of_scale, of_offset = (torch.empty(scale.shape if h else (0,), dtype=torch.float32, device=x.device) for h in has)
    return torch.empty_like(x), of_scale, of_offset
