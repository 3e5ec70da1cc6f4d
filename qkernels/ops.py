"""The contract: the signature and meaning of every op.

Arguments are checked once (`qkernels.arguments`); backends trust them. All ops run under
`torch.compile(fullgraph=True)` and `torch.inference_mode`. `out=` (a tensor, or a pair for two results; contiguous, not
overlapping an input) receives the results instead of new tensors. Float tensors are float32, bfloat16 or float16.
Refusals are a TypeError (kind or dtype) or a ValueError (shape, device, value) of one sentence.

Number rules. Rounding is half to even; activation codes are -127..127. *Dynamic* rule, per row: `scale = absmax / 127`,
`code = rne(y * (127 / absmax))`; a row with absmax below 2^-100 has codes 0 and scale 1. *Static* rule: `code =
clamp(rne(y * (1 / scale)) + zero_point)`. Rows with NaN or Inf, and all rows under a static scale that has no
positive finite reciprocal, get codes 0 and scale NaN, so that the fault reaches the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments, checks
from . import schemas as _registers_the_ops  # noqa: F401
from .contract import Epilogue
from .registry import call
from .weights import Int4Weight, Int8Weight

Pair = tuple[Tensor, Tensor]


def quantize_per_token(
    x: Tensor,
    smooth: Tensor | None = None,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    *,
    out: Pair | None = None,
) -> Pair:
    """Quantize rows to int8, dynamically (a scale per row) or statically (the given one). Bit-exact on every backend.

    Args:
        x: float `[..., K]`, any strides.
        smooth: float `[K]`, multiplies x first (pass 1/s of SmoothQuant).
        scale: one positive number; makes it static. `zero_point`: one integer, static only; a linear op takes such
            codes with the bias of `qkernels.zero_point_bias`.

    Returns: codes int8 `[..., K]` and scales float32 `[...]`, by the rules at the top of this module.
    """
    checks.whole("quantize_per_token", zero_point)
    return call("quantize_per_token", out, *arguments.quantize_per_token(x, smooth, scale, zero_point))


def quantize_patches(
    x: Tensor,
    patch: int | tuple[int, int],
    smooth: Tensor | None = None,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    *,
    out: Pair | None = None,
) -> Pair:
    """Cut images into patches and quantize each as a row, as `quantize_per_token` does. Bit-exact on every backend.

    What a convolution whose stride is its kernel (patch embedding) reads, ready for a linear op. A remainder at the
    right and at the lower edge is dropped, as there.

    Args:
        x: float `[B, C, H, W]`, any strides.
        patch: height and width of a patch, (p, q), or one number for both; a patch must fit into the image.
        smooth: float `[C*p*q]`; `scale`, `zero_point`: as in `quantize_per_token`.

    Returns: codes int8 `[B, N, C*p*q]` and scales float32 `[B, N]`, N = (H // p) * (W // q) patches, row by row of the
        image; values in the order (channel, line, column).
    """
    checks.whole("quantize_patches", zero_point)
    height, width = checks.pair("quantize_patches", "patch", patch)
    return call("quantize_patches", out, *arguments.quantize_patches(x, height, width, smooth, scale, zero_point))


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    smooth: Tensor | None = None,
    scale: Tensor | float | None = None,
    zero_point: Tensor | int | None = None,
    *,
    out: Pair | None = None,
) -> Pair:
    """LayerNorm over the last axis, then `quantize_per_token`, in one pass.

    Args: x float `[..., K]`; weight and bias float `[K]` or None; eps >= 0; the rest as in `quantize_per_token`.
        Statistics are float32 (a row whose variance leaves that range comes out NaN). Codes are the reference's but
        for one step near ties.

    Returns: codes int8 `[..., K]` and scales float32 `[...]`.
    """
    checks.whole("layer_norm_quantize", zero_point)
    checked = arguments.layer_norm_quantize(x, weight, bias, eps, smooth, scale, zero_point)
    return call("layer_norm_quantize", out, *checked)


def int8_linear(
    x: Tensor,
    x_scale: Tensor | float,
    weight: Int8Weight,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | float | None = None,
    out_zero_point: Tensor | int | None = None,
    out_group: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | Pair | None = None,
) -> Tensor | Pair:
    """`y = activation(x_scale * weight.scales * (x @ codes^T) + bias) + residual`, from int8 codes, with int32
    accumulators.

    Args:
        x: int8 `[..., K]`, codes -127..127, K <= 65,536.
        x_scale: float32, per row `[...]`, for the tensor (a number), or per 128 inputs of a row `[..., ceil(K/128)]`.
        weight: Int8Weight of shape (N, K), best in the layout of the backend (`qkernels.pack(weight)`).
        bias: float `[N]`. activation: None, "gelu" (exact), "quick_gelu", "gelu_tanh". residual: float `[..., N]`.
        out_scale: a number or float32 `[N]`: the result leaves as int8 by the static rule, with `out_zero_point`; not
            finite becomes 0.
        out_group: 128: it leaves as int8 by the dynamic rule per 128 outputs.
        out_dtype: dtype of a float result.

    Returns: `[..., N]` of `out_dtype`, or int8; with `out_group` int8 and float32 scales `[..., ceil(N/128)]`. The
        epilogue is `fma(float(acc), x_scale * w_scale, bias)`, then the activation, then the residual: within 2
        float32 ulp of the largest term.
    """
    op = "int8_linear"
    checks.whole(op, out_zero_point)
    epilogue = Epilogue(
        bias=bias,
        activation=activation,
        residual=residual,
        out_scale=out_scale,  # type: ignore[arg-type]
        out_zero_point=out_zero_point,  # type: ignore[arg-type]
        out_group=out_group,
        out_dtype=out_dtype,
    )
    x, scale, _, epilogue = arguments.int8_linear(x, x_scale, weight, epilogue)
    result = call(op, out, x, scale, weight.codes, weight.scales, *weight.shape, weight.layout, *epilogue)
    return _unlisted(result, out)


def int4_linear(
    x: Tensor,
    x_scale: Tensor | float | None,
    weight: Int4Weight,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | float | None = None,
    out_zero_point: Tensor | int | None = None,
    out_group: int | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | Pair | None = None,
) -> Tensor | Pair:
    """`int8_linear` with 4-bit weights in groups, `value = scale * (code - zero)`.

    x is int8 with `x_scale` (W4A8), or float with `x_scale=None` (W4A16). `weight` is an Int4Weight. Everything else,
    the results included, as in `int8_linear`. Sums over groups are float32: within (groups + 2) ulp of the sum of
    magnitudes; W4A16 within 1e-5 (float32 x) or 1e-2.
    """
    op = "int4_linear"
    checks.whole(op, out_zero_point)
    epilogue = Epilogue(
        bias=bias,
        activation=activation,
        residual=residual,
        out_scale=out_scale,  # type: ignore[arg-type]
        out_zero_point=out_zero_point,  # type: ignore[arg-type]
        out_group=out_group,
        out_dtype=out_dtype,
    )
    x, scale, _, epilogue = arguments.int4_linear(x, x_scale, weight, epilogue)
    parts = weight.codes, weight.scales, weight.zeros, *weight.shape, weight.group, weight.layout
    return _unlisted(call(op, out, x, scale, *parts, *epilogue), out)


def _unlisted(result: Any, out: Any) -> Any:
    """`Tensor[]` results of one or two as a tensor or a pair."""
    if out is not None:
        return out
    return result[0] if len(result) == 1 else tuple(result)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    out_scale: Tensor | float | None = None,
    out_dynamic: bool = False,
    *,
    out: Tensor | Pair | None = None,
) -> Tensor | Pair:
    """`softmax(scale * q k^T + mask) v` per head, for short sequences. Not differentiable.

    Args:
        q: float `[B, Lq, H, d]`; k, v: `[B, Lk, H, d]` of the same dtype. Any strides.
        mask: float, added, or bool, True = may attend; broadcastable to `[B, H, Lq, Lk]`.
        causal: query i attends keys 0..i (as `is_causal` of torch), besides the mask.
        scale: default `d ** -0.5`.
        out_scale: a number or float32 `[H, d]`: the result leaves as int8 by the static rule; not finite becomes 0.
        out_dynamic: it leaves as int8 by the dynamic rule over the H*d values of a token.

    Returns: `[B, Lq, H, d]` of q's dtype, or int8, or with `out_dynamic` int8 and float32 scales `[B, Lq]`. A query
        that may attend nothing gets zeros. Float32: within 1e-5 of float64; 16 bits: within 1e-2 of its norm.
    """
    checked = arguments.attention(q, k, v, mask, causal, scale, out_scale, out_dynamic)
    return _unlisted(call("attention", out, *checked), out)


def channel_absmax(x: Tensor, running: Tensor | None = None, *, out: Tensor | None = None) -> Tensor | None:
    """Largest magnitude of every channel: float `[..., K]` -> float32 `[K]`, 0 without rows. NaN wins. Bit-exact on
    every backend.

    With `running` (float32 `[K]`, contiguous) the maximum is taken into it, in place, and nothing is returned.
    """
    op = "channel_absmax"
    if running is None:
        return call(op, out, *arguments.channel_absmax(x))
    if out is not None:
        raise ValueError(f"{op}: running is updated in place, so out has no meaning; leave it out")
    arguments.channel_absmax_(x, running)
    torch.ops.qkernels.channel_absmax_(x, running)
    return None


def smooth_scale(act_absmax: Tensor, weight_absmax: Tensor, strength: float, *, out: Tensor | None = None) -> Tensor:
    """SmoothQuant's factors `s_j = act_absmax_j^strength / weight_absmax_j^(1 - strength)`, not normalised; 1 where
    either maximum is 0.

    Args: two float `[K]`, largest magnitudes per input channel of the activations and of the weight; strength in [0,
        1].
    Returns: float32 `[K]`. Activations are divided by s and weights multiplied (Xiao et al. 2022, equation 4).
    """
    return call("smooth_scale", out, *arguments.smooth_scale(act_absmax, weight_absmax, strength))


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float | None,
    qmin: int,
    qmax: int,
    estimator: str,
    axis: int | None = None,
    group: int | None = None,
    grad_scale: float = 1.0,
    delta: float = 0.0,
) -> Tensor:
    """Quantize and dequantize, with a gradient of one's choice where rounding has none.

    With v = x * (1 / scale) it is `scale * (clamp(rne(v) + zero_point, qmin, qmax) - zero_point)`; for "lsq_plus" and
    "ewgs", v = (x - zero_point) * (1 / scale), it is `scale * rne(clamp(v, qmin, qmax)) + zero_point`. Computed in
    float32, every operation rounded once, returned in x's dtype: bit-exact on every backend.

    Args:
        x: float, any shape.
        scale: one number; `[x.shape[axis]]` with `axis`; `[..., ceil(K/group)]` with `group` (consecutive values of
            the last axis share one).
        zero_point: None (0), one number, or a tensor of the scale's shape. "ste" and "lsq": integers. "lsq_plus" and
            "ewgs": a float offset in units of x, which gets a gradient. "pact" and "dorefa" have none.
        estimator: what the gradients are. G is the incoming one; inside is `qmin <= v + zero_point <= qmax` (offsets:
            `qmin <= v <= qmax`), and bound the violated one of qmin and qmax (minus an integer zero_point).

            ==========  ===============================  ====================================  ======================
            estimator   of x                             of the scale, a sum of                of the offset, a sum of
            ==========  ===============================  ====================================  ======================
            "ste"       G inside, 0 outside              none
            "lsq"       as "ste"                         G * (rne(v) - v inside, bound out)
            "lsq_plus"  as "ste"                         as "lsq"                              0 inside, G outside
            "ewgs"      E inside, 0 outside              as "lsq", and (G - E) * v inside      G - E inside, G outside
            "pact"      G where qmin < v < qmax, else 0  0 there, else G * bound
            "dorefa"    G                                none
            ==========  ===============================  ====================================  ======================

            E = G + |G| * delta * (v - rne(v)) / (qmax - qmin). Sources: LSQ Esser et al. 2019; LSQ+ Bhalgat et al.
            2020; EWGS Lee et al. 2021, clipping to [l, h] with scale = (h - l) / qmax, zero_point = l, qmin = 0; PACT
            Choi et al. 2018, scale = alpha / qmax; DoReFa Zhou et al. 2016, x in [0, 1] already (clamp it before),
            scale = 1 / qmax.
        grad_scale: factor of the gradients of scale and offset, which are summed in a fixed order.
        delta: strength of "ewgs", per unit of the grid scaled to [0, 1]; 0 for the others.

    Where x is NaN so is the result, x gets gradient 0 ("dorefa": G), and its scale and offset get NaN.

    Returns: x's shape and dtype.
    """
    if estimator in ("ste", "lsq"):
        checks.whole("fake_quantize", zero_point, f" for estimator {estimator!r}")
    checked = arguments.fake_quantize(x, scale, zero_point, qmin, qmax, estimator, axis, group, grad_scale, delta)
    return call("fake_quantize", None, *checked)


def hadamard_transform(x: Tensor, transpose: bool = False, *, out: Tensor | None = None) -> Tensor:
    """Multiply every row by an orthonormal Hadamard matrix T, or by its transpose: `[..., n] -> T x`. Differentiable.

    Widths are `m * 2^k` with m = 1, 12, 20, 28, 36, 44 and further orders of `qkernels.hadamard`; others raise
    ValueError. T is not symmetric where m is of Paley's first kind (12, 20, 44). Linear maps keep their result when
    the same T turns x and the rows of the weight. Computed in float32, returned in x's dtype; T then the transpose is
    the identity to 1e-5.
    """
    return call("hadamard_transform", out, *arguments.hadamard_transform(x, transpose))
