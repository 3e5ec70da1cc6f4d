"""What each op takes: the function of an op's name checks its arguments and gives them back in the form that backends
trust, or raises. `qkernels.ops` says what they mean, `qkernels.checks` has the single checks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .contract import FLOATS, Epilogue
from .hadamard import base_order
from .weights import Int4Weight, Int8Weight


def quantize_per_token(x: Tensor, smooth: Any, scale: Any, zero_point: Any) -> tuple:
    op = "quantize_per_token"
    checks.rows(op, "x", x, FLOATS)
    smooth = checks.vector(op, "smooth", smooth, x.shape[-1], x.device)
    zero_point = checks.zero_point(op, zero_point, scale, x.device)
    return x, smooth, checks.scalar(op, "scale", scale, x.device), zero_point


def quantize_patches(x: Tensor, height: int, width: int, smooth: Any, scale: Any, zero_point: Any) -> tuple:
    op = "quantize_patches"
    checks.tensor(op, "x", x, FLOATS)
    checks.patch(op, x, height, width)
    smooth = checks.vector(op, "smooth", smooth, x.shape[1] * height * width, x.device)
    zero_point = checks.zero_point(op, zero_point, scale, x.device)
    return x, height, width, smooth, checks.scalar(op, "scale", scale, x.device), zero_point


def layer_norm_quantize(
    x: Tensor, weight: Any, bias: Any, eps: float, smooth: Any, scale: Any, zero_point: Any
) -> tuple:
    op = "layer_norm_quantize"
    checks.rows(op, "x", x, FLOATS)
    eps = checks.number(op, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    width, device = x.shape[-1], x.device
    weight = checks.vector(op, "weight", weight, width, device, None)
    bias = checks.vector(op, "bias", bias, width, device, None)
    smooth = checks.vector(op, "smooth", smooth, width, device)
    zero_point = checks.zero_point(op, zero_point, scale, device)
    return x, weight, bias, eps, smooth, checks.scalar(op, "scale", scale, device), zero_point


def int8_linear(x: Tensor, x_scale: Any, weight: Int8Weight, epilogue: Epilogue) -> tuple:
    op = "int8_linear"
    checks.rows(op, "x", x, (torch.int8,))
    checks.weight(op, weight, Int8Weight)
    return x, checks.x_scale(op, x, x_scale), weight, checks.epilogue(op, x, weight, epilogue)


def int4_linear(x: Tensor, x_scale: Any, weight: Int4Weight, epilogue: Epilogue) -> tuple:
    op = "int4_linear"
    checks.rows(op, "x", x, (torch.int8, *FLOATS))
    checks.weight(op, weight, Int4Weight)
    if (x.dtype == torch.int8) != (x_scale is not None):
        raise ValueError(
            f"{op}: int8 x needs x_scale and float x must come without it, got {x.dtype} "
            f"{'without' if x_scale is None else 'with'} x_scale"
        )
    scale = None if x_scale is None else checks.x_scale(op, x, x_scale)
    return x, scale, weight, checks.epilogue(op, x, weight, epilogue)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    out_scale: Any,
    out_dynamic: bool,
) -> tuple:
    op = "attention"
    checks.tensor(op, "q", q, FLOATS)
    for name, value in (("k", k), ("v", v)):
        checks.tensor(op, name, value, (q.dtype,), q.device, "q")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"{op}: q must be [B, Lq, H, d] and k, v [B, Lk, H, d], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    batch, queries, heads, d = q.shape
    if d == 0:
        raise ValueError(f"{op}: heads of width 0 have nothing to attend with, got q of shape {tuple(q.shape)}")
    if mask is not None:
        checks.tensor(op, "mask", mask, (torch.bool, *FLOATS), q.device, "q")
        wanted = (batch, heads, queries, k.shape[1])
        padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
        if len(padded) != 4 or not all(have == 1 or have == want for have, want in zip(padded, wanted, strict=True)):
            raise ValueError(f"{op}: mask of shape {tuple(mask.shape)} does not broadcast to [B, H, Lq, Lk] = {wanted}")
        mask = mask.reshape(padded)
    if checks.flag(op, "out_dynamic", out_dynamic) and out_scale is not None:
        raise ValueError(f"{op}: out_scale is static and out_dynamic is not; give one of them")
    if isinstance(out_scale, Tensor) and out_scale.numel() != 1:
        checks.tensor(op, "out_scale", out_scale, FLOATS, q.device)
        if out_scale.shape != q.shape[2:]:
            raise ValueError(
                f"{op}: out_scale must be one number or [H, d] = {(heads, d)}, got {tuple(out_scale.shape)}"
            )
        out_scale = out_scale.float().contiguous()
    else:
        out_scale = checks.scalar(op, "out_scale", out_scale, q.device)
    scale = d**-0.5 if scale is None else checks.number(op, "scale", scale)
    return q, k, v, mask, checks.flag(op, "causal", causal), scale, out_scale, out_dynamic


def channel_absmax(x: Tensor) -> tuple:
    return (checks.rows("channel_absmax", "x", x, FLOATS),)


def channel_absmax_(x: Tensor, running: Tensor) -> None:
    op = "channel_absmax"
    checks.rows(op, "x", x, FLOATS)
    checks.tensor(op, "running", running, (torch.float32,), x.device)
    if running.shape != x.shape[-1:] or not running.is_contiguous():
        raise ValueError(
            f"{op}: running must be contiguous of shape ({x.shape[-1]},), got shape {tuple(running.shape)}"
        )


def smooth_scale(act_absmax: Tensor, weight_absmax: Tensor, strength: float) -> tuple:
    op = "smooth_scale"
    checks.tensor(op, "act_absmax", act_absmax, FLOATS)
    if act_absmax.dim() != 1:
        raise ValueError(f"{op}: act_absmax must have shape [K], got {tuple(act_absmax.shape)}")
    strength = checks.number(op, "strength", strength)
    if not 0 <= strength <= 1:
        raise ValueError(f"{op}: strength must lie in [0, 1], got {strength}")
    checks.tensor(op, "weight_absmax", weight_absmax, FLOATS)
    weight = checks.vector(op, "weight_absmax", weight_absmax, act_absmax.shape[0], act_absmax.device)
    return act_absmax.float().contiguous(), weight, strength


def fake_quantize(
    x: Tensor,
    scale: Any,
    zero_point: Any,
    qmin: int,
    qmax: int,
    estimator: str,
    axis: int | None,
    group: int | None,
    grad_scale: float,
    delta: float,
) -> tuple:
    op = "fake_quantize"
    checks.tensor(op, "x", x, FLOATS)
    grad_scale, delta = checks.number(op, "grad_scale", grad_scale), checks.number(op, "delta", delta)
    checks.estimator(op, estimator, qmin, qmax, delta)
    scale, axis = checks.fake_quantize_scale(op, x, scale, axis, group)
    zero = checks.fake_quantize_zero_point(op, scale, zero_point, estimator)
    return x, scale, zero, qmin, qmax, estimator, axis, group, grad_scale, delta


def fake_quantize_backward(grad: Tensor, *rest: Any) -> tuple:
    checked = fake_quantize(*rest)
    x = checked[0]
    checks.tensor("fake_quantize_backward", "grad", grad, (x.dtype,), x.device)
    if grad.shape != x.shape:
        raise ValueError(f"fake_quantize_backward: grad must have x's shape {tuple(x.shape)}, got {tuple(grad.shape)}")
    return grad, *checked


def hadamard_transform(x: Tensor, transpose: bool) -> tuple:
    op = "hadamard_transform"
    checks.rows(op, "x", x, FLOATS)
    if base_order(int(x.shape[-1])) is None:
        raise ValueError(
            f"{op}: no Hadamard matrix of width {x.shape[-1]} is known; widths are 2^k * 1, 12, 20, 28, 36, 44, ..."
        )
    return x, checks.flag(op, "transpose", transpose)
