"""What the ops must compute, in float64 on the device of the inputs, and how far a result may be from it
(docs/methods.md, Numbers).

A float32 step of the contract is a float64 step rounded to float32: for one product, sum or quotient of float32
numbers that is the correctly rounded result. Nothing here imports a backend of `qkernels`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TINY, EPS = 2.0**-100, 2.0**-23
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class WrongError(AssertionError):
    """A result is outside what the contract allows; the message says by how much."""


def rounded(x: Tensor) -> Tensor:
    """Float64 -> nearest float32, held in float64."""
    return x.float().double()


def require(condition: Tensor | bool, what: str) -> None:
    if not bool(condition):
        raise WrongError(what)


def most(excess: Tensor) -> str:
    return f"{float(excess.max()):.3g}" if excess.numel() else "nothing"


def equal(got: Tensor, want: Tensor, what: str) -> None:
    """Bit for bit; NaN equals NaN."""
    got, want = got.double(), want.double()
    different = ~((got == want) | (got.isnan() & want.isnan()))
    require(not different.any(), f"{what}: {int(different.sum())} of {different.numel()} values differ")


# -- quantization of rows --------------------------------------------------------------------------------------------


def quantize(y: Tensor, scale: float | None = None, zero: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows of float32 values held in float64, by the dynamic or the static rule."""
    finite = y.isfinite().all(-1)
    if scale is None:
        absmax = y.abs().amax(-1)
        small = absmax < TINY
        steps = torch.where(small, 1.0, rounded(absmax / 127))
        inverse = torch.where(small, 0.0, rounded(127 / absmax))
    else:
        steps = torch.full(y.shape[:-1], rounded(torch.tensor(scale).double()).item(), dtype=y.dtype, device=y.device)
        inverse = rounded(1 / steps)
    codes = (torch.round(rounded(y * inverse[..., None])) + zero).clamp(-127, 127)
    return torch.where(finite[..., None], codes, 0.0), torch.where(finite, steps, torch.nan)


def patches(x: Tensor, height: int, width: int) -> Tensor:
    batch, channels, lines, columns = x.shape
    rows, across = lines // height, columns // width
    x = x[:, :, : rows * height, : across * width].reshape(batch, channels, rows, height, across, width)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * across, channels * height * width)


def near_codes(codes: Tensor, v: Tensor, error: Tensor | float, what: str) -> None:
    """Codes are round(clip(v)) of some v within `error` (in steps, as v) of the exact one."""
    away = (codes.double() - v.clamp(-127, 127)).abs() - 0.5 - error
    require((away <= 0).all(), f"{what}: a code is {most(away)} steps beyond what the rule allows")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The value and the size of its terms, which its error is relative to."""
    centred = x - x.mean(-1, keepdim=True)
    factor = weight / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    mean = x.mean(-1, keepdim=True).abs()
    return centred * factor + bias, (centred.abs() + mean) * factor.abs() + bias.abs()


# -- linear maps -----------------------------------------------------------------------------------------------------


def activate(y: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return y * torch.sigmoid(1.702 * y) if activation == "quick_gelu" else y


def linear8(x: Tensor, x_scale: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The linear part and 2 ulp of its largest term. `x_scale` is `[M]`, or `[M, groups]` of 128 inputs."""
    if x_scale.dim() == 1:
        y = (x.double() @ codes.double().T) * (x_scale.double()[:, None] * scales.double())
        size, ulps = y.abs(), 2.0
    else:
        spread = x_scale.double().repeat_interleave(128, 1)[:, : x.shape[1]]
        y = (x.double() * spread) @ codes.double().T * scales.double()
        size = (x.double().abs() * spread) @ codes.double().abs().T * scales.double()
        ulps = x_scale.shape[1] + 2.0
    if bias is not None:
        y, size = y + bias.double(), torch.maximum(size, bias.double().abs())
    return y, ulps * EPS * size


def linear4(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, groups: int, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same with a dequantized float64 weight; sums over groups are float32: groups + 2 ulp of the magnitudes."""
    y, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if x_scale is not None:
        y, size = y * x_scale.double()[:, None], size * x_scale.double()[:, None]
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    relative = (groups + 2) * EPS if x_scale is not None else 1e-5 if x.dtype == torch.float32 else 1e-2
    return y, relative * size


def finish(linear: Tensor, error: Tensor, activation: str | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Activation (its slope is at most 1.13) and residual; 1e-6 besides."""
    y, error = activate(linear, activation), error * (1.13 if activation else 1.0) + 1e-6
    if residual is not None:
        y, error = y + residual.double(), error + 2 * EPS * residual.double().abs()
    return y, error


def near_floats(got: Tensor, value: Tensor, error: Tensor, what: str) -> None:
    """Within the error, plus one ulp of the output type where that is shorter than float32."""
    require(got.isfinite().all(), f"{what}: not finite")
    if got.dtype != torch.float32:
        error = error + ULP[got.dtype] * value.abs() + (2.0**-24 if got.dtype == torch.float16 else 0.0)
    excess = (got.double() - value).abs() - error
    require((excess <= 0).all(), f"{what}: beyond the bound by {most(excess)}")


def static_codes(got: Tensor, value: Tensor, error: Tensor, scale: Tensor, zero: int, what: str) -> None:
    inverse = rounded(1 / scale.double())
    near_codes(got, (value * inverse + zero), error * inverse + value.abs() * 2 * EPS * inverse + 1e-6, what)


def group_codes(codes: Tensor, scales: Tensor, value: Tensor, error: Tensor, what: str) -> None:
    """int8 by the dynamic rule, one scale for 128 columns of a row."""
    for g in range(scales.shape[1]):
        part = slice(128 * g, 128 * g + 128)
        v, e, scale = value[:, part], error[:, part].amax(1), scales[:, g].double()
        absmax = v.abs().amax(1)
        near_zero = absmax <= 2 * e
        good = (scale - absmax / 127).abs() <= 1.01 * e / 127 + absmax * EPS
        require((good | near_zero).all(), f"{what}: a group's scale is not its largest magnitude / 127")
        back = (codes[:, part].double() * scale[:, None] - v).abs() <= scale[:, None] * 0.51 + 2 * e[:, None]
        require((back | near_zero[:, None]).all(), f"{what}: a code is more than a step off")


# -- attention -------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        queries, keys = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(queries, keys, device=q.device).triu(1).bool(), -torch.inf)
    return (torch.nan_to_num(scores.softmax(-1)) @ v).transpose(1, 2)


# -- training --------------------------------------------------------------------------------------------------------


def fake_quantize(
    x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y in float32 steps, dx, and LSQ's terms of the scale's gradient, element by element. `scale` and `zero` have
    x's shape."""
    v = rounded(x.double() * rounded(1 / scale)) + zero
    code = torch.round(v).clamp(qmin, qmax)
    inside = (v >= qmin) & (v <= qmax)
    terms = torch.where(inside, torch.round(v) - v, code - zero)
    return rounded((code - zero) * scale), torch.where(inside, grad.double(), 0.0), grad.double() * terms


def hadamard(width: int, device: torch.device) -> Tensor:
    """The orthonormal matrix T, float64 `[n, n]`: base matrix (x) Sylvester / sqrt(n)."""
    from qkernels.hadamard import base_matrix, base_order

    order = base_order(width)
    assert order is not None
    matrix = base_matrix(order).double()
    while matrix.shape[0] < width:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return (matrix / width**0.5).to(device)
