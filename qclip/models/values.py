"""Which numbers a model's float tensors may hold, from whatever file they come."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError

# Logits are cosines times exp(logit_scale): CLIP's training caps that at 100, SigLIP's ends near 118. e^10 is 22,026: a
# softmax over such logits is one-hot, and what is trained with them has no gradient.
LOGIT_SCALE = 10.0
LOGIT_BIAS = 1000.0


def span(tensor: Tensor) -> tuple[float, float]:
    """Least and greatest value, NaN where one is NaN; no copy of the tensor is made. (0, 0) of an empty one."""
    if not tensor.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(tensor.detach())
    return float(low), float(high)


def check_float(name: str, tensor: Tensor, where: str, refuse: type[InputError]) -> None:
    """Raises `refuse` for integers where a model holds floats: codes, whose scales would be lost."""
    if not tensor.is_floating_point():
        raise refuse(
            f"{name!r} in {where!r} holds {str(tensor.dtype).removeprefix('torch.')} where the model has floats; such "
            "codes of another quantization mean nothing without their scales: give the float checkpoint"
        )


def check_values(name: str, tensor: Tensor, where: str, refuse: type[InputError]) -> None:
    """Raises `refuse` for NaN, Inf, and a logit scale or bias that no training gives."""
    if not tensor.is_floating_point():
        return
    low, high = span(tensor)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise refuse(f"{name!r} in {where!r} holds NaN or Inf; the checkpoint is damaged")
    for leaf, most in (("logit_scale", LOGIT_SCALE), ("logit_bias", LOGIT_BIAS)):
        if name == leaf and max(-low, high) > most:
            worst = low if -low > high else high
            raise refuse(f"{name!r} in {where!r} is {worst:g}; it must lie between -{most:g} and {most:g}")
