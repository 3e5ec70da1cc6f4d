"""Which numbers the tensors of a quantized layer may hold; looked at as they are read, one tensor at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import ArtifactError
from .models.values import check_values, span
from .recipes import SitePlan

POSITIVE = ("scales", "smooth", "input_scale")


def code_range(weight_bits: int) -> tuple[int, int]:
    """Least and greatest code of a grid with a byte per code: `sym` at 5 bits and above, `symfull` below (two codes per
    byte, at 4 bits, use every value)."""
    top = 2 ** (weight_bits - 1) - 1
    return (-top if weight_bits >= 5 else -top - 1), top


def check_site_values(name: str, attribute: str, tensor: Tensor, plan: SitePlan, where: str) -> None:
    """Raises ArtifactError for codes outside the plan's grid, scales that are not positive (or, where the plan
    allows it, negative), normal and finite, and NaN or Inf elsewhere; names the tensor and its worst value."""
    if attribute == "codes":
        low, high = code_range(plan.weight_bits)
        least, most = span(tensor)
        if tensor.dtype == torch.int8 and not (low <= least and most <= high):
            worst = least if least < low else most
            raise ArtifactError(
                f"{name!r} in {where!r} holds the code {worst:.0f}; codes of {plan.weight_bits} bits lie between {low} "
                f"and {high}"
            )
    elif attribute in POSITIVE:
        # The search for the least squared error turns the grid of few bits around where that fits better.
        turned = attribute == "scales" and plan.weight_observer == "mse" and plan.weight_bits <= 4
        least, most = span(tensor.abs() if turned else tensor)
        smallest = torch.finfo(tensor.dtype).tiny  # below it are the subnormal numbers, whose digits fade
        if not (smallest <= least and most < math.inf):
            worst = most if smallest <= least else least
            raise ArtifactError(
                f"{name!r} in {where!r} holds {worst:g}; it must hold positive, normal, finite numbers of "
                f"{tensor.dtype}"
            )
    else:
        check_values(name, tensor, where, ArtifactError)
