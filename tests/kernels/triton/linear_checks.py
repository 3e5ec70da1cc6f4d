"""What the interpreter's tests of both linear ops share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qkernels.triton import launch
from tests.kernels.fresh_memory import guarded
from tests.kernels.linear_cases import check_codes, check_float, check_groups, finish

CHIPS = {"pointers": launch.Chip(80, 3, 163 * 1024), "descriptors": launch.Chip(90, 3, 227 * 1024)}

#: (activation, residual, out, its dtype, zero point), so that every branch of the epilogue is met
ENDS: list[tuple[str | None, torch.dtype | None, str, torch.dtype, int | None]] = [
    (None, None, "float", torch.float32, None),
    ("gelu", torch.float32, "float", torch.bfloat16, None),
    ("quick_gelu", torch.bfloat16, "float", torch.float16, None),
    ("gelu_tanh", torch.float16, "groups", torch.int8, None),
    ("gelu", None, "groups", torch.int8, None),
    (None, torch.float16, "tensor", torch.int8, -3),
    ("quick_gelu", None, "channel", torch.int8, 100),
    ("gelu_tanh", None, "channel", torch.int8, None),
]


def pretend(monkeypatch: pytest.MonkeyPatch, form: str) -> launch.Chip:
    """Kernels take operands as they do on this kind of chip."""
    monkeypatch.setattr(launch, "INTERPRETER", CHIPS[form])
    return CHIPS[form]


def check_end(
    op: Any, linear: torch.Tensor, size: torch.Tensor, ulps: float, end: tuple, bias: torch.Tensor | None, seed: int
) -> None:
    """Run `op(bias=, activation=, ...)` into poisoned memory and compare with `linear` (float64, without the bias).

    `size`: what the error is relative to.
    """
    activation, residual_type, out_kind, dtype, zero = end
    m, n = linear.shape
    generator = torch.Generator().manual_seed(seed)
    residual = None if residual_type is None else torch.randn(m, n, generator=generator).to(residual_type)
    if bias is not None:
        linear, size = linear + bias.double(), size + bias.double().abs()
    exact = finish(linear, size, ulps, activation, residual)
    kwargs: dict[str, Any] = {"bias": bias, "activation": activation, "residual": residual}
    out = guarded((m, n), dtype)
    if out_kind == "groups":
        scales = guarded((m, -(-n // 128)), torch.float32)
        op(out_group=128, out=(out, scales), **kwargs)
        check_groups(out, scales, exact)
    elif out_kind == "float":
        op(out_dtype=dtype, out=out, **kwargs)
        check_float(out, exact)
    else:
        scale = torch.rand(n if out_kind == "channel" else (), generator=generator) * 0.05 + 0.01
        op(out_scale=scale, out_zero_point=zero, out=out, **kwargs)
        check_codes(out, exact, scale, float(zero or 0))
