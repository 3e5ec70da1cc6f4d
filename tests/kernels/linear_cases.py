"""What the tests of both linear ops share: exact results in float64, and the error bounds of the contract."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

EPS = 2.0**-23
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass
class Exact:
    """A result in float64 and the float32 error that the contract allows around it."""

    value: torch.Tensor
    error: torch.Tensor


def activate(y: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return y * torch.sigmoid(1.702 * y) if activation == "quick_gelu" else y


def finish(
    linear: torch.Tensor, size: torch.Tensor, ulps: float, activation: str | None, residual: torch.Tensor | None
) -> Exact:
    """Epilogue in float64. `size` is what the bound is relative to, before the residual."""
    y = activate(linear, activation)
    if residual is not None:
        y, size = y + residual.double(), torch.maximum(size, residual.double().abs())
    return Exact(y, ulps * EPS * size + 1e-6)


def check_float(got: torch.Tensor, exact: Exact) -> None:
    """Within the error, plus one ulp of the output type where that is shorter than float32."""
    assert torch.isfinite(got).all()
    error = exact.error
    if got.dtype != torch.float32:
        smallest = 2.0**-24 if got.dtype == torch.float16 else 0.0
        error = error + ULP[got.dtype] * exact.value.abs() + smallest
    excess = (got.double() - exact.value).abs() - error
    assert (excess <= 0).all(), f"over the bound by {excess.max():.3g}"


def check_codes(got: torch.Tensor, exact: Exact, scale: torch.Tensor, zero_point: float = 0.0) -> None:
    """int8 by the static rule: the code of some value within the error of the exact one."""
    assert got.dtype == torch.int8
    inverse = (1.0 / scale.float()).double()
    slack = exact.error + exact.value.abs() * 2 * EPS

    def code(y: torch.Tensor) -> torch.Tensor:
        return (torch.round(y * inverse) + zero_point).clamp(-127, 127)

    assert (got >= code(exact.value - slack)).all() and (got <= code(exact.value + slack)).all()
    # One step at most, and nearly never.
    wrong = got.double() != code(exact.value)
    assert (got.double() - code(exact.value)).abs().max() <= 1 and wrong.double().mean() < 0.02 + 1.0 / got.numel()


def check_groups(codes: torch.Tensor, scales: torch.Tensor, exact: Exact) -> None:
    """int8 by the dynamic rule, one scale for 128 columns of a row."""
    n = codes.shape[-1]
    for g in range(-(-n // 128)):
        part = slice(128 * g, min(128 * g + 128, n))
        value, error, scale = exact.value[:, part], exact.error[:, part].amax(1), scales[:, g].double()
        absmax = value.abs().amax(1)
        near_zero = absmax <= 2 * error
        assert (((scale - absmax / 127).abs() <= 1.01 * error / 127 + absmax * EPS) | near_zero).all()
        back = codes[:, part].double() * scale[:, None]
        assert (((back - value).abs() <= scale[:, None] * 0.51 + 2 * error[:, None]) | near_zero[:, None]).all()
