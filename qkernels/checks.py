"""What the ops ask of their arguments. Every refusal is one sentence: the op, the argument, what it is, what it should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
MAX_ELEMENTS = 2**31 - 1
MAX_K = 65536  # above it an int32 accumulator, shifted by 128, could overflow


def tensor(op: str, name: str, value: Any, dtypes: Sequence[torch.dtype], device: torch.device | None = None) -> Tensor:
    """A dense tensor of one of `dtypes`, on `device`, with fewer than 2^31 elements."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device} but x is on {device}; move one of them")
    few(op, name, value.shape)
    return value


def few(op: str, name: str, shape: Sequence[int]) -> None:
    """Fewer than 2^31 elements, so that an index of 32 bits is enough in every kernel."""
    count = 1
    for size in shape:
        count = count * size
    if count > MAX_ELEMENTS:
        raise ValueError(f"{op}: {name} of shape {tuple(shape)} has 2^31 elements or more; split the batch")


def rows(op: str, name: str, value: Any, dtypes: Sequence[torch.dtype]) -> Tensor:
    """`[..., K]` with K >= 1."""
    tensor(op, name, value, dtypes)
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have shape [..., K] with K >= 1, got {tuple(value.shape)}")
    return value


def vector(op: str, name: str, value: Any, size: int, device: torch.device) -> Tensor | None:
    """Float `[size]` as contiguous float32, or None."""
    if value is None:
        return None
    tensor(op, name, value, FLOATS, device)
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"{op}: {name} must have shape ({size},), got {tuple(value.shape)}")
    return value.float().contiguous()


def scalar(op: str, name: str, value: Any, device: torch.device) -> Tensor | None:
    """A number or a tensor of one element as float32 `[]` on `device`, or None."""
    if value is None:
        return None
    if isinstance(value, int | float):
        return torch.full((), float(value), dtype=torch.float32, device=device)
    tensor(op, name, value, (*FLOATS, *INTEGERS), device)
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} must be one number for the whole tensor, got shape {tuple(value.shape)}")
    return value.float().reshape(())


def zero_point(op: str, value: Any, scale: Any, device: torch.device) -> Tensor | None:
    """A whole number as float32 `[]`, only together with a scale, or None."""
    if value is None:
        return None
    if scale is None:
        raise ValueError(f"{op}: zero_point is for static quantization; give scale as well, or leave both out")
    if isinstance(value, float) or (isinstance(value, Tensor) and value.dtype not in INTEGERS):
        kind = value.dtype if isinstance(value, Tensor) else "float"
        raise TypeError(f"{op}: zero_point must be an integer, got {kind}")
    return scalar(op, "zero_point", value, device)


def outputs(
    op: str, out: Any, specs: Sequence[tuple[Sequence[int], torch.dtype]], device: torch.device
) -> list[Tensor]:
    """`out=` as a list that fits the op's results, contiguous."""
    given = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple | list) else None
    if given is None or len(given) != len(specs) or not all(isinstance(target, Tensor) for target in given):
        wanted = "a tensor" if len(specs) == 1 else f"{len(specs)} tensors"
        raise TypeError(f"{op}: out must be {wanted}, got {type(out).__name__}")
    for target, (shape, dtype) in zip(given, specs, strict=True):
        if target.dtype != dtype or tuple(target.shape) != tuple(shape) or target.device != device:
            raise ValueError(
                f"{op}: out must be {str(dtype).removeprefix('torch.')} of shape {tuple(shape)} on {device}, "
                f"got {str(target.dtype).removeprefix('torch.')} of shape {tuple(target.shape)} on {target.device}"
            )
        if not target.is_contiguous():
            raise ValueError(f"{op}: out of shape {tuple(shape)} must be contiguous, got strides {target.stride()}")
    return given
