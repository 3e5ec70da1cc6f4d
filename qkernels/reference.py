"""Every op in plain torch, for any device: the truth that the other backends are compared with.

Arguments were validated and normalised in `qkernels.ops`: scales are float32 tensors, masks broadcast, widths are
supported. Where the contract asks for bits (scales, codes, `fake_quantize`), the arithmetic is float32 with one
rounding per operation; where it asks for closeness, it is float64. Every function takes `out` (a tensor, or a pair for
two results) and then writes there.

Two traps of torch: `127 / t` is `t.reciprocal() * 127`, two roundings, and division by a Python number is a
multiplication by its reciprocal on a GPU. Divisors are tensors here.

All ops stand in one file, long as it is, so that the whole contract can be read in one place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import GROUP, LEARNED_SCALE, NO_EPILOGUE, OFFSET, Epilogue
from .grids import dynamic_scales
from .hadamard import base_matrix, base_order
from .weights import Int4Weight, Int8Weight


def _deliver(out: Any, *results: Tensor) -> Any:
    """The results, or `out` after they were written into it."""
    if out is None:
        return results if len(results) > 1 else results[0]
    for target, result in zip((out,) if isinstance(out, Tensor) else out, results, strict=True):
        target.copy_(result)
    return out


def _divide(a: float, b: Tensor) -> Tensor:
    return torch.full_like(b, a) / b


def _quantize_rows(y: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """Float32 `[..., K]` -> int8 codes and float32 scales `[...]`, by the dynamic rule or, with `scale`, the static
    one."""
    absmax = y.abs().amax(-1)
    good = torch.isfinite(absmax)
    if scale is None:
        scales, inverse = dynamic_scales(absmax, 127)
        inverse = inverse.unsqueeze(-1)
    else:
        inverse = _divide(1.0, scale)
        good = good & torch.isfinite(inverse) & (inverse > 0)
        scales = scale.expand_as(absmax)
    rounded = torch.round(y * inverse)
    if zero_point is not None:
        rounded = rounded + zero_point
    codes = torch.where(good.unsqueeze(-1), rounded.clamp(-127, 127), 0.0).to(torch.int8)
    return codes, torch.where(good, scales, math.nan)


def quantize_per_token(
    x: Tensor,
    smooth: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.quantize_per_token`."""
    y = x.float() if smooth is None else x.float() * smooth
    return _deliver(out, *_quantize_rows(y, scale, zero_point))


def quantize_patches(
    x: Tensor,
    height: int,
    width: int,
    smooth: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.quantize_patches`."""
    batch, channels, lines, columns = x.shape
    down, across = lines // height, columns // width
    x = x[:, :, : down * height, : across * width].reshape(batch, channels, down, height, across, width)
    patches = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, down * across, channels * height * width)
    return quantize_per_token(patches, smooth, scale, zero_point, out=out)


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    smooth: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.layer_norm_quantize`. Statistics that exceed float32 make the row NaN, as they do in float32
    kernels."""
    d = x.double()
    centred = d - d.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    overflow = torch.isinf(variance.float()) | torch.isinf(d.sum(-1, keepdim=True).float())
    y = centred / torch.sqrt(variance + eps)
    if weight is not None:
        y = y * weight.double()
    if bias is not None:
        y = y + bias.double()
    y = torch.where(overflow, math.nan, y).float()
    if smooth is not None:
        y = y * smooth
    return _deliver(out, *_quantize_rows(y, scale, zero_point))


def _activate(y: Tensor, activation: str | None) -> Tensor:
    """Float32 in and out, computed in float64."""
    if activation is None:
        return y
    d = y.double()
    if activation == "gelu":
        return F.gelu(d).float()
    if activation == "gelu_tanh":
        return F.gelu(d, approximate="tanh").float()
    return (d * torch.sigmoid(1.702 * d)).float()


def _finish(y: Tensor, end: Epilogue) -> tuple[Tensor, ...]:
    """Float32 `[M, N]` after the bias -> the op's results, `[M, N]` and for groups scales `[M, ceil(N/128)]`."""
    y = _activate(y, end.activation)
    if end.residual is not None:
        y = y + end.residual.float().reshape(y.shape)
    if end.out_group is not None:
        n = y.shape[1]
        groups = -(-n // GROUP)
        padded = F.pad(y, (0, groups * GROUP - n)).view(-1, groups, GROUP)
        codes, scales = _quantize_rows(padded, None, None)
        return codes.view(-1, groups * GROUP)[:, :n], scales
    if end.out_scale is not None:
        return (_to_codes(y, end.out_scale, end.out_zero_point),)
    return (y.to(end.out_dtype),)


def _to_codes(y: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """The static rule value by value; what is not finite becomes 0."""
    rounded = torch.round(y * _divide(1.0, scale))
    if zero_point is not None:
        rounded = rounded + zero_point
    return torch.where(torch.isfinite(y) & ~torch.isnan(rounded), rounded.clamp(-127, 127), 0.0).to(torch.int8)


def _deliver_shaped(out: Any, lead: torch.Size, results: tuple[Tensor, ...]) -> Any:
    return _deliver(out, *(result.reshape(*lead, result.shape[-1]) for result in results))


def _spread(x_scale: Tensor, x: Tensor) -> Tensor:
    """Activation scales (scalar, a row, or a group of 128 of a row) as something that broadcasts to x as `[rows,
    K]`."""
    if x_scale.dim() == x.dim():
        return x_scale.reshape(-1, x_scale.shape[-1]).repeat_interleave(GROUP, dim=1)[:, : x.shape[-1]]
    return x_scale.reshape(-1, 1)


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Int8Weight,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.int8_linear`."""
    weight = weight.canonical()
    n, k = weight.shape
    codes = x.reshape(-1, k).double()
    scales = _spread(x_scale, x)
    if scales.shape[1] == 1:
        # Sums of int8 products are exact in float64. float(acc), the product of the scales and the sum are rounded
        # once each.
        acc = (codes @ weight.codes.double().t()).float()
        y = acc.double() * (scales * weight.scales).double()
    else:
        y = (codes * scales.double()) @ weight.codes.double().t() * weight.scales.double()
    if epilogue.bias is not None:
        y = y + epilogue.bias.double()
    return _deliver_shaped(out, x.shape[:-1], _finish(y.float(), epilogue))


def int4_linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Int4Weight,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.int4_linear`."""
    n, k = weight.shape
    rows = x.reshape(-1, k).double()
    if x_scale is not None:
        rows = rows * _spread(x_scale, x).double()
    y = rows @ weight.dequantize().double().t()
    if epilogue.bias is not None:
        y = y + epilogue.bias.double()
    return _deliver_shaped(out, x.shape[:-1], _finish(y.float(), epilogue))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    out_scale: Tensor | None = None,
    out_dynamic: bool = False,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.attention`. Float64 inside, some images at a time."""
    batch, queries, heads, d = q.shape
    keys = k.shape[1]
    scale = d**-0.5 if scale is None else scale
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril() if causal else None
    y = torch.empty(batch, queries, heads, d, dtype=torch.float32, device=q.device)
    step = max(1, 2**23 // max(1, heads * queries * keys))
    for start in range(0, batch, step):
        part = slice(start, start + step)
        scores = torch.einsum("bqhd,bkhd->bhqk", q[part].double(), k[part].double()) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[part], -math.inf) if mask.dtype == torch.bool else scores + mask[part]
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        # Where nothing may be attended the softmax is 0/0: such a query gets zeros.
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores, -1).masked_fill(nothing, 0.0)
        y[part] = torch.einsum("bhqk,bkhd->bqhd", weights, v[part].double()).float()
    if out_dynamic:
        codes, scales = _quantize_rows(y.flatten(2), None, None)
        return _deliver(out, codes.view(y.shape), scales)
    return _deliver(out, y.to(q.dtype) if out_scale is None else _to_codes(y, out_scale))


def channel_absmax(x: Tensor, running: Tensor | None = None, *, out: Any = None) -> Any:
    """See `qkernels.ops.channel_absmax`."""
    rows = x.reshape(-1, x.shape[-1]).float().abs()
    found = rows.amax(0) if len(rows) else rows.new_zeros(x.shape[-1])
    if running is None:
        return _deliver(out, found)
    running.copy_(torch.maximum(running, found))
    return None


def smooth_scale(act_absmax: Tensor, weight_absmax: Tensor, strength: float, *, out: Any = None) -> Any:
    """See `qkernels.ops.smooth_scale`."""
    found = act_absmax.double().pow(strength) / weight_absmax.double().pow(1 - strength)
    return _deliver(out, torch.where((act_absmax == 0) | (weight_absmax == 0), 1.0, found).float())


def _per_element(values: Tensor, x: Tensor, axis: int | None, group: int | None) -> Tensor:
    """Scales (or zero points) of `fake_quantize` in a shape that broadcasts with x."""
    if group is not None:
        return values.repeat_interleave(group, dim=-1)[..., : x.shape[-1]]
    if axis is None:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = x.shape[axis]
    return values.reshape(shape)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    estimator: str,
    axis: int | None = None,
    group: int | None = None,
    grad_scale: float = 1.0,
    delta: float = 0.0,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.fake_quantize`; the forward half."""
    y, s = x.float(), _per_element(scale, x, axis, group)
    z = torch.zeros((), device=x.device) if zero_point is None else _per_element(zero_point, x, axis, group)
    inverse = _divide(1.0, s)
    if estimator in OFFSET:
        return _deliver(out, (torch.round(((y - z) * inverse).clamp(qmin, qmax)) * s + z).to(x.dtype))
    codes = (torch.round(y * inverse) + z).clamp(qmin, qmax)
    return _deliver(out, ((codes - z) * s).to(x.dtype))


def _where(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    estimator: str,
    axis: int | None,
    group: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v in units of the scale (decided in float32, then float64), whether it lies below and above the grid, and the
    grid's bounds."""
    s = _per_element(scale, x, axis, group)
    z = torch.zeros((), device=x.device) if zero_point is None else _per_element(zero_point, x, axis, group)
    offset = estimator in OFFSET
    low, high = (torch.full_like(z, bound) if offset else bound - z for bound in (qmin, qmax))
    v = ((x.float() - z) if offset else x.float()) * _divide(1.0, s)
    below, above = (v <= low, v >= high) if estimator == "pact" else (v < low, v > high)
    return v.double(), below, above, low, high


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    estimator: str,
    axis: int | None = None,
    group: int | None = None,
    grad_scale: float = 1.0,
    delta: float = 0.0,
    *,
    out: Any = None,
) -> Any:
    """Gradients of `fake_quantize`: of x (its dtype), of the scale and of the offset (float32, the scale's shape; shape
    (0,) where the estimator has none). Where v lies is decided in float32, as in the forward half; sums are float64."""
    w, below, above, low, high = _where(x, scale, zero_point, qmin, qmax, estimator, axis, group)
    offset, g = estimator in OFFSET, grad.double()
    residual = torch.round(w) - w
    # What EWGS takes from the gradient inside; not a factor 0 for the others, where G may be infinite.
    bend = g.abs() * residual * (delta / (qmax - qmin)) if estimator == "ewgs" else 0 * w
    dx = g if estimator == "dorefa" else torch.where(below | above | w.isnan(), 0.0, g - bend)

    def total(terms: Tensor) -> Tensor:
        if group is not None:
            padding = scale.shape[-1] * group - x.shape[-1]
            sums = F.pad(terms, (0, padding)).view(*scale.shape, group).sum(-1)
        elif axis is None:
            sums = terms.sum()
        else:
            sums = terms.movedim(axis, 0).flatten(1).sum(1) if x.dim() > 1 else terms
        return (sums * grad_scale).float().reshape(scale.shape)

    dscale = doffset = scale.new_empty(0)
    if estimator in LEARNED_SCALE:
        inside = 0 * w if estimator == "pact" else g * residual + bend * w
        dscale = total(torch.where(below, g * low, torch.where(above, g * high, inside)))
    if offset and zero_point is not None:
        doffset = total(torch.where(below | above, g, bend))
    return _deliver(out, dx.to(x.dtype), dscale, doffset)


def fake_quantize_tangent(
    x_tangent: Tensor | None,
    scale_tangent: Tensor | None,
    offset_tangent: Tensor | None,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    estimator: str,
    axis: int | None = None,
    group: int | None = None,
    grad_scale: float = 1.0,
    delta: float = 0.0,
) -> Tensor:
    """The transpose of `fake_quantize_backward`, in x's dtype: what becomes of a small step of x, the scale and the
    offset (None: no step), while rounding and clipping stay as they are. Linear, and differentiable, in the steps."""
    x, scale = x.detach(), scale.detach()
    zero_point = None if zero_point is None else zero_point.detach()
    v, below, above, low, high = _where(x, scale, zero_point, qmin, qmax, estimator, axis, group)
    result = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    if x_tangent is not None:
        step = x_tangent.double()
        result = step if estimator == "dorefa" else torch.where(below | above | v.isnan(), 0.0, step)
    if scale_tangent is not None and estimator in LEARNED_SCALE:
        residual = 0 * v if estimator == "pact" else torch.round(v) - v
        share = torch.where(below, low, torch.where(above, high, residual))
        result = result + _per_element(scale_tangent.double() * grad_scale, x, axis, group) * share
    if offset_tangent is not None and estimator in OFFSET:
        step = _per_element(offset_tangent.double() * grad_scale, x, axis, group)
        result = result + torch.where(v.isnan(), v, (below | above).double()) * step
    return result.to(x.dtype)


def hadamard_transform(x: Tensor, transpose: bool = False, *, out: Any = None) -> Any:
    """See `qkernels.ops.hadamard_transform`. Float64 inside."""
    n = x.shape[-1]
    m = base_order(n)
    assert m is not None
    y = x.double().reshape(-1, m, n // m)
    half = 1
    while half < n // m:
        pairs = y.reshape(-1, m, n // m // (2 * half), 2, half)
        a, b = pairs[:, :, :, 0], pairs[:, :, :, 1]
        y = torch.stack([a + b, a - b], dim=3).reshape(-1, m, n // m)
        half *= 2
    base = base_matrix(m).to(device=x.device, dtype=torch.float64)
    y = torch.einsum("ij,rjk->rik", base.t() if transpose else base, y)
    return _deliver(out, (y / math.sqrt(n)).reshape(x.shape).to(x.dtype))
