"""How the values of a tensor share the scales of `fake_quantize`, as every backend walks over them, and which of them
have gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import LEARNED_SCALE, OFFSET


class Sharing(NamedTuple):
    """`runs` runs of `length` neighbours, each with one scale, in the order of memory; the last of every `period` runs
    is `last` long, and run i uses scale i % `scales`. Runs of one value and several scales: every column of a matrix
    has its own scale."""

    runs: int
    length: int
    period: int
    last: int
    scales: int

    @property
    def by_columns(self) -> bool:
        return self.length == 1 and self.scales > 1


def sharing(x: Tensor, scale: Tensor, axis: int | None, group: int | None) -> Sharing:
    """Of a contiguous x with at least one value; `axis` and `group` as `qkernels.ops.fake_quantize` normalises them."""
    if group is not None:
        period = scale.shape[-1]
        last = x.shape[-1] - (period - 1) * group
        if period == 1 or last == group:
            return Sharing(scale.numel(), last, 1, last, scale.numel())
        return Sharing(scale.numel(), group, period, last, scale.numel())
    if axis is None or x.shape[axis] == 1:
        return Sharing(1, x.numel(), 1, x.numel(), 1)
    length = x.shape[axis + 1 :].numel()
    return Sharing(x.shape[: axis + 1].numel(), length, 1, length, scale.numel())


def learned(zero_point: Tensor | None, estimator: str) -> tuple[bool, bool]:
    """Whether the estimator gives the scale a gradient, and the offset."""
    return estimator in LEARNED_SCALE, estimator in OFFSET and zero_point is not None


def new_gradients(x: Tensor, scale: Tensor, has: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the results of `fake_quantize_backward`: of x, the scale and the offset; (0,) where there is none."""
    of_scale, of_offset = (torch.empty(scale.shape if h else (0,), dtype=torch.float32, device=x.device) for h in has)
    return torch.empty_like(x), of_scale, of_offset
