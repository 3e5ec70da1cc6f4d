"""The CPU backend: functions of the same names and arguments as in `qkernels.reference`, over `qkernels._native`.

Arguments were validated in `qkernels.ops`. Float inputs may be float32, bfloat16 or float16. A function takes every case that `supports`
lets through.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from qkernels.weights import Int4Weight, Int8Weight

# Found or not, never "found but broken": an extension that fails to import raises.
native: Any = importlib.import_module("qkernels._native") if importlib.util.find_spec("qkernels._native") else None
missing: str | None = None
if native is None:
    missing = "qkernels was installed without its native code (no C++ compiler was found then; install g++ and reinstall)"

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # QkType in csrc/cpu/ops.h
ACTIVATIONS = {None: 0, "gelu": 1, "quick_gelu": 2, "gelu_tanh": 3}

_tier_wanted: str | None = None


def use_tier(name: str | None) -> None:
    """Run `name` (`scalar`, `avx2`, `avx512vnni`) from now on; None means the best one.

    Raises ValueError where the name is unknown or the processor cannot run it.
    """
    global _tier_wanted
    if name != _tier_wanted:
        native.set_tier(name or native.tiers()[-1])
        _tier_wanted = name


def supports(op: str, *args: Any, **kwargs: Any) -> str | None:
    """None where this backend runs `op` with these arguments, else the reason, worded to follow "the cpu backend"."""
    limits = _limits.get(op)
    if limits is None:
        return "does not have this op"
    return limits(*args, **kwargs)


def _always(*args: Any, **kwargs: Any) -> str | None:
    return None


def _address(tensor: Tensor | None) -> int:
    """data_ptr, or a null pointer for None. The caller keeps the tensor alive."""
    return 0 if tensor is None else tensor.data_ptr()


def _floats(tensor: Tensor | None) -> Tensor | None:
    """Contiguous float32, or None."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _packed(layout: str) -> Any:
    def limits(x: Tensor, x_scale: Tensor | None, weight: Int8Weight | Int4Weight, *args: Any, **kwargs: Any) -> str | None:
        if weight.layout != layout:
            return f"wants a weight in layout '{layout}', not '{weight.layout}' (call weight.pack() once)"
        return None

    return limits


class _Epilogue:
    """The arguments that both linear ops end with, as the native functions take them; keeps what they point to alive."""

    def __init__(
        self,
        lead: torch.Size,
        n: int,
        bias: Tensor | None,
        activation: str | None,
        residual: Tensor | None,
        out_scale: Tensor | None,
        out_zero_point: Tensor | None,
        out_group: int | None,
        out_dtype: torch.dtype,
        out: Any,
    ) -> None:
        if out_scale is not None or out_group is not None:
            out_dtype = torch.int8
        if out is None:
            out = torch.empty(*lead, n, dtype=out_dtype)
            if out_group is not None:
                out = (out, torch.empty(*lead, -(-n // out_group), dtype=torch.float32))
        self.result = out
        codes, group_scales = (out[0], out[1]) if out_group is not None else (out, None)
        bias, scale, zero = _floats(bias), _floats(out_scale), _floats(out_zero_point)
        residual = None if residual is None else residual.contiguous()
        self.alive = (bias, scale, zero, residual)
        self.arguments = (
            _address(bias),
            ACTIVATIONS[activation],
            _address(residual),
            0 if residual is None else TYPES[residual.dtype],
            _address(codes),
            TYPES[codes.dtype],
            _address(scale),
            int(scale is not None and scale.numel() > 1),
            _address(zero),
            int(zero is not None and zero.numel() > 1),
            _address(group_scales),
            torch.get_num_threads(),
        )


def _scale_kind(x: Tensor, x_scale: Tensor) -> int:
    """0: one number, 1: one a row, 2: one for each 128 inputs of a row."""
    if x_scale.dim() == x.dim():
        return 2
    return 0 if x_scale.dim() == 0 else 1


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_group: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.int8_linear`. The weight must be in layout `vnni64`."""
    n, k = weight.shape
    x, scale = x.contiguous(), _floats(x_scale)
    end = _Epilogue(x.shape[:-1], n, bias, activation, residual, out_scale, out_zero_point, out_group, out_dtype, out)
    native.int8_linear(
        x.data_ptr(),
        x.numel() // k,
        k,
        _address(scale),
        _scale_kind(x, x_scale),
        weight.codes.data_ptr(),
        weight.scales.data_ptr(),
        n,
        *end.arguments,
    )
    return end.result


# One line an op: what it cannot take. An op that is not here falls back.
_limits: dict[str, Any] = {
    "int8_linear": _packed("vnni64"),
}
