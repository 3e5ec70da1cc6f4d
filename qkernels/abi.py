"""How arguments reach the native functions of csrc/: by the names of their parameters, as addresses and numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .contract import ACTIVATIONS, Epilogue

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # QkType in csrc/cpu/ops.h, qk::Type
ACTIVATION_NUMBERS: dict[str | None, int] = {None: 0, **{name: number for number, name in enumerate(ACTIVATIONS, 1)}}


class Parameters:
    """The parameters of a native function, in its order: their names, and the places of those that are pointers."""

    def __init__(self, text: str) -> None:
        """Of a C parameter list: `const float* x, int n`."""
        parts = [part.strip() for part in text.split(",")]
        self.names = tuple(part.split()[-1].lstrip("*") for part in parts)
        self.pointers = tuple(place for place, part in enumerate(parts) if "*" in part)
        self._in_order = operator.itemgetter(*self.names)

    def words(self, arguments: dict[str, Any]) -> list[Any]:
        """The arguments in order, tensors as the addresses of their values and None as a null pointer. Whoever holds
        `arguments` keeps the tensors alive. Raises TypeError where a name is missing or unknown."""
        try:
            words = list(self._in_order(arguments))
        except KeyError:
            words = []
        if len(words) != len(arguments):
            raise TypeError(f"arguments must be {', '.join(self.names)}; got {', '.join(arguments)}")
        for place in self.pointers:
            tensor = words[place]
            words[place] = 0 if tensor is None else tensor.data_ptr()
        return words


def floats(tensor: Tensor | None) -> Tensor | None:
    """Contiguous float32, or None."""
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):  # as most are: no call of torch
        return tensor
    return tensor.float().contiguous()


def scale_kind(x: Tensor, x_scale: Tensor | None) -> int:
    """0: one number (or none), 1: one per row, 2: one per 128 inputs of a row."""
    if x_scale is None or x_scale.dim() == 0:
        return 0
    return 2 if x_scale.dim() == x.dim() else 1


def epilogue_arguments(epilogue: Epilogue, out: Any) -> dict[str, Any]:
    """What both linear ops end with; `out`: a tensor, or a pair with `out_group`."""
    codes, group_scales = out if epilogue.out_group is not None else (out, None)
    residual = None if epilogue.residual is None else epilogue.residual.contiguous()
    return {
        "bias": floats(epilogue.bias),
        "activation": ACTIVATION_NUMBERS[epilogue.activation],
        "residual": residual,
        "residual_type": 0 if residual is None else TYPES[residual.dtype],
        "out": codes,
        "out_type": TYPES[codes.dtype],
        "out_scale": floats(epilogue.out_scale),
        "out_zero_point": floats(epilogue.out_zero_point),
        "group_scales": group_scales,
    }


def several(values: Tensor | None) -> int:
    """1 where there is a value for each output, else 0."""
    return int(values is not None and values.numel() > 1)
