"""Which numbers the tensors of a layer may hold; looked at as they are read from a file."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..models.values import span


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises ArtifactError for NaN and Inf; `what` names the tensor."""
    if tensor.is_floating_point() and not all(map(math.isfinite, span(tensor))):
        raise ArtifactError(f"{what} holds NaN or Inf; the artifact is damaged")


def check_normal(tensor: Tensor, what: str, positive: bool) -> None:
    """Raises ArtifactError for NaN, Inf, zeros and subnormal numbers, which have fewer digits; with `positive`, for
    negative ones, too."""
    least, most = span(tensor if positive else tensor.abs())
    smallest = torch.finfo(tensor.dtype).tiny
    if not (smallest <= least and most < math.inf):
        worst = most if smallest <= least else least
        kind = "positive, normal, finite numbers" if positive else "normal, finite numbers"
        raise ArtifactError(f"{what} holds {worst:g}; it must hold {kind} of {tensor.dtype}")
