"""What cannot be recorded, on a tape or in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


class UnrecordableError(RuntimeError):
    """A function does something that cannot be replayed; the message says what."""


def check_plain(tensors: list[Tensor]) -> None:
    if any(t.device.type != "cpu" or t.layout != torch.strided or type(t) not in PLAIN for t in tensors):
        raise UnrecordableError("it uses a tensor that is no plain one in host memory")


def depends_on_values(function: Any, tensors: list[Tensor]) -> bool:
    """Whether the result's shape, or a number on the host, depends on what is in the tensors."""
    if function._schema.name == "aten::index":  # by numbers it does not, by truth values it does
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan())
