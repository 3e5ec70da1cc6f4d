"""The contract: every op's signature, meaning, checks, registration with torch, and gradient. It is one file, although
a long one, because whoever writes a backend or calls an op reads it as one; checks and registration live elsewhere.

Arguments are checked here, once; backends trust them. All ops run under `torch.compile(fullgraph=True)` and
`torch.inference_mode`. `out=` (a tensor, or a pair for two results; contiguous, not overlapping an input) receives
the results instead of new tensors. Float tensors are float32, bfloat16 or float16. Refusals are a TypeError (kind or
dtype) or a ValueError (shape, device, value) of one sentence.

Number rules. Rounding is half to even; activation codes are -127..127. *Dynamic* rule, per row: `scale = absmax / 127`,
`code = rne(y * (127 / absmax))`; a row with absmax below 2^-100 has codes 0 and scale 1. *Static* rule: `code =
clamp(rne(y * (1 / scale)) + zero_point)`. Rows with NaN or Inf, and all rows under a static scale that has no
positive finite reciprocal, get codes 0 and scale NaN, so that the fault reaches the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .contract import FLOATS, Epilogue
from .derivatives import Derivative, below_autograd
from .granularity import learned
from .hadamard import base_order
from .registry import call, library, register, untraced
from .weights import Int4Weight, Int8Weight

Pair = tuple[Tensor, Tensor]


# -- quantization of activations -------------------------------------------------------------------------------------


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
    return call("quantize_per_token", out, *_check_quantize_per_token(x, smooth, scale, zero_point))


def _check_quantize_per_token(x: Tensor, smooth: Any, scale: Any, zero_point: Any) -> tuple:
    op = "quantize_per_token"
    checks.rows(op, "x", x, FLOATS)
    smooth = checks.vector(op, "smooth", smooth, x.shape[-1], x.device)
    zero_point = checks.zero_point(op, zero_point, scale, x.device)
    return x, smooth, checks.scalar(op, "scale", scale, x.device), zero_point


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
    return call("quantize_patches", out, *_check_quantize_patches(x, height, width, smooth, scale, zero_point))


def _check_quantize_patches(x: Tensor, height: int, width: int, smooth: Any, scale: Any, zero_point: Any) -> tuple:
    op = "quantize_patches"
    checks.tensor(op, "x", x, FLOATS)
    checks.patch(op, x, height, width)
    smooth = checks.vector(op, "smooth", smooth, x.shape[1] * height * width, x.device)
    zero_point = checks.zero_point(op, zero_point, scale, x.device)
    return x, height, width, smooth, checks.scalar(op, "scale", scale, x.device), zero_point


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
    checked = _check_layer_norm_quantize(x, weight, bias, eps, smooth, scale, zero_point)
    return call("layer_norm_quantize", out, *checked)


def _check_layer_norm_quantize(
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


def _rows_and_scales(x: Tensor, *_: Any) -> list:
    return [(x.shape, torch.int8), (x.shape[:-1], torch.float32)]


def _patches_and_scales(x: Tensor, height: int, width: int, *_: Any) -> list:
    batch, channels, lines, columns = x.shape
    lead = (batch, (lines // height) * (columns // width))
    return [((*lead, channels * height * width), torch.int8), (lead, torch.float32)]


register(
    "quantize_per_token",
    "Tensor x, Tensor? smooth, Tensor? scale, Tensor? zero_point",
    "(Tensor, Tensor)",
    _rows_and_scales,
    _check_quantize_per_token,
)
register(
    "quantize_patches",
    "Tensor x, int height, int width, Tensor? smooth, Tensor? scale, Tensor? zero_point",
    "(Tensor, Tensor)",
    _patches_and_scales,
    _check_quantize_patches,
)
register(
    "layer_norm_quantize",
    "Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? smooth, Tensor? scale, Tensor? zero_point",
    "(Tensor, Tensor)",
    _rows_and_scales,
    _check_layer_norm_quantize,
)


# -- linear maps -----------------------------------------------------------------------------------------------------


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
    x, scale, _, epilogue = _check_int8_linear(x, x_scale, weight, epilogue)
    result = call(op, out, x, scale, weight.codes, weight.scales, *weight.shape, weight.layout, *epilogue)
    return _unlisted(result, out)


def _check_int8_linear(x: Tensor, x_scale: Any, weight: Int8Weight, epilogue: Epilogue) -> tuple:
    op = "int8_linear"
    checks.rows(op, "x", x, (torch.int8,))
    checks.weight(op, weight, Int8Weight)
    return x, checks.x_scale(op, x, x_scale), weight, checks.epilogue(op, x, weight, epilogue)


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
    x, scale, _, epilogue = _check_int4_linear(x, x_scale, weight, epilogue)
    parts = weight.codes, weight.scales, weight.zeros, *weight.shape, weight.group, weight.layout
    return _unlisted(call(op, out, x, scale, *parts, *epilogue), out)


def _check_int4_linear(x: Tensor, x_scale: Any, weight: Int4Weight, epilogue: Epilogue) -> tuple:
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


def _unlisted(result: Any, out: Any) -> Any:
    """`Tensor[]` results of one or two as a tensor or a pair."""
    if out is not None:
        return out
    return result[0] if len(result) == 1 else tuple(result)


_EPILOGUE = (
    "Tensor? bias, str? activation, Tensor? residual, Tensor? out_scale, Tensor? out_zero_point, "
    "int? out_group, ScalarType out_dtype"
)
register(
    "int8_linear",
    f"Tensor x, Tensor x_scale, Tensor codes, Tensor scales, SymInt n, SymInt k, str layout, {_EPILOGUE}",
    "Tensor[]",
    lambda x, x_scale, codes, scales, n, k, layout, *end: Epilogue(*end).results(x.shape[:-1], n),
    _check_int8_linear,
    lambda x, x_scale, codes, scales, n, k, layout, *end: (
        x,
        x_scale,
        Int8Weight(codes, scales, (n, k), layout),
        Epilogue(*end),
    ),
)
register(
    "int4_linear",
    "Tensor x, Tensor? x_scale, Tensor codes, Tensor scales, Tensor? zeros, "
    f"SymInt n, SymInt k, SymInt group, str layout, {_EPILOGUE}",
    "Tensor[]",
    lambda x, x_scale, codes, scales, zeros, n, k, group, layout, *end: Epilogue(*end).results(x.shape[:-1], n),
    _check_int4_linear,
    lambda x, x_scale, codes, scales, zeros, n, k, group, layout, *end: (
        x,
        x_scale,
        Int4Weight(codes, scales, zeros, (n, k), group, layout),
        Epilogue(*end),
    ),
)


# -- attention -------------------------------------------------------------------------------------------------------


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
    checked = _check_attention(q, k, v, mask, causal, scale, out_scale, out_dynamic)
    return _unlisted(call("attention", out, *checked), out)


def _check_attention(
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


def _attention_shapes(
    q: Tensor, k: Any, v: Any, mask: Any, causal: bool, scale: Any, out_scale: Any, out_dynamic: bool
) -> list:
    if out_dynamic:
        return [(q.shape, torch.int8), (q.shape[:2], torch.float32)]
    return [(q.shape, q.dtype if out_scale is None else torch.int8)]


register(
    "attention",
    "Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, Tensor? out_scale, bool out_dynamic",
    "Tensor[]",
    _attention_shapes,
    _check_attention,
)


# -- statistics ------------------------------------------------------------------------------------------------------


def channel_absmax(x: Tensor, running: Tensor | None = None, *, out: Tensor | None = None) -> Tensor | None:
    """Largest magnitude of every channel: float `[..., K]` -> float32 `[K]`, 0 without rows. NaN wins. Bit-exact on
    every backend.

    With `running` (float32 `[K]`, contiguous) the maximum is taken into it, in place, and nothing is returned.
    """
    op = "channel_absmax"
    if running is None:
        return call(op, out, *_check_channel_absmax(x))
    if out is not None:
        raise ValueError(f"{op}: running is updated in place, so out has no meaning; leave it out")
    _check_running(x, running)
    torch.ops.qkernels.channel_absmax_(x, running)
    return None


def _check_channel_absmax(x: Tensor) -> tuple:
    return (checks.rows("channel_absmax", "x", x, FLOATS),)


def _check_running(x: Tensor, running: Tensor) -> None:
    op = "channel_absmax"
    checks.rows(op, "x", x, FLOATS)
    checks.tensor(op, "running", running, (torch.float32,), x.device)
    if running.shape != x.shape[-1:] or not running.is_contiguous():
        raise ValueError(
            f"{op}: running must be contiguous of shape ({x.shape[-1]},), got shape {tuple(running.shape)}"
        )


def _update_absmax(x: Tensor, running: Tensor) -> None:
    _check_running(x, running)
    checks.apart("channel_absmax", [running], [x], "running")
    dispatch.select("channel_absmax", x.device, x, running)(x, running)
    torch.autograd.graph.increment_version(running)


def _update_absmax_once(x: Tensor, running: Tensor) -> None:
    """Maxima are statistics: they carry no gradient, whatever x asks for."""
    with below_autograd():
        torch.ops.qkernels.channel_absmax_(x, running)


register("channel_absmax", "Tensor x", "Tensor", lambda x: [(x.shape[-1:], torch.float32)], _check_channel_absmax)
library.define("channel_absmax_(Tensor x, Tensor(a!) running) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
library.impl("channel_absmax_", untraced(_update_absmax), "CompositeExplicitAutograd")
library.impl("channel_absmax_", untraced(_update_absmax_once), "Autograd")
torch.library.register_fake("qkernels::channel_absmax_", lambda x, running: None, lib=library)


def smooth_scale(act_absmax: Tensor, weight_absmax: Tensor, strength: float, *, out: Tensor | None = None) -> Tensor:
    """SmoothQuant's factors `s_j = act_absmax_j^strength / weight_absmax_j^(1 - strength)`, not normalised; 1 where
    either maximum is 0.

    Args: two float `[K]`, largest magnitudes per input channel of the activations and of the weight; strength in [0,
        1].
    Returns: float32 `[K]`. Activations are divided by s and weights multiplied (Xiao et al. 2022, equation 4).
    """
    return call("smooth_scale", out, *_check_smooth_scale(act_absmax, weight_absmax, strength))


def _check_smooth_scale(act_absmax: Tensor, weight_absmax: Tensor, strength: float) -> tuple:
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


register(
    "smooth_scale",
    "Tensor act_absmax, Tensor weight_absmax, float strength",
    "Tensor",
    lambda act_absmax, weight_absmax, strength: [(act_absmax.shape, torch.float32)],
    _check_smooth_scale,
)


# -- training --------------------------------------------------------------------------------------------------------


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
    checked = _check_fake_quantize(x, scale, zero_point, qmin, qmax, estimator, axis, group, grad_scale, delta)
    return call("fake_quantize", None, *checked)


def _check_fake_quantize(
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


def _check_fake_quantize_backward(grad: Tensor, *rest: Any) -> tuple:
    checked = _check_fake_quantize(*rest)
    x = checked[0]
    checks.tensor("fake_quantize_backward", "grad", grad, (x.dtype,), x.device)
    if grad.shape != x.shape:
        raise ValueError(f"fake_quantize_backward: grad must have x's shape {tuple(x.shape)}, got {tuple(grad.shape)}")
    return grad, *checked


def _gradients(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> list:
    has = learned(zero_point, rest[2])
    return [(x.shape, x.dtype), *((scale.shape if there else (0,), torch.float32) for there in has)]


_FAKE_QUANTIZE = (
    "Tensor x, Tensor scale, Tensor? zero_point, int qmin, int qmax, str estimator, "
    "int? axis, int? group, float grad_scale, float delta"
)


class _FakeQuantizeDerivative(Derivative):
    """Reverse mode by the estimator, forward mode its transpose."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors, ctx.rest = inputs[:3], inputs[3:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        dx, *others = call("fake_quantize_backward", None, grads[0], x, scale, zero_point, *ctx.rest)
        has = learned(zero_point, ctx.rest[2])
        return dx, *(found if there else None for found, there in zip(others, has, strict=True)), *[None] * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        _check_linear("forward-mode", ctx.rest)
        x, scale, offset = tangents[:3]
        return reference.fake_quantize_tangent(x, scale, offset, *ctx.saved_tensors, *ctx.rest)


class _FakeQuantizeSecondDerivative(Derivative):
    """Of the gradients. They are linear in the incoming gradient ("ewgs" is not), and where x, scale and offset move,
    rounding and clipping stay as they are, as in the first derivative: so it is 0 by these."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        tensors, ctx.rest = inputs[1:4], inputs[4:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _check_linear("double backward", ctx.rest)
        tensors = x, scale, zero_point = ctx.saved_tensors
        of_scale, of_offset = learned(zero_point, ctx.rest[2])
        steps = grads[0], grads[1] if of_scale else None, grads[2] if of_offset else None
        constant = (
            torch.zeros_like(t) if needed else None
            for t, needed in zip(tensors, ctx.needs_input_grad[1:4], strict=True)
        )
        by_grad = reference.fake_quantize_tangent(steps[0], steps[1], steps[2], *tensors, *ctx.rest)
        return by_grad, *constant, *[None] * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        _check_linear("forward-mode", ctx.rest)
        x, scale, zero_point = ctx.saved_tensors
        grad = torch.zeros_like(x) if tangents[0] is None else tangents[0]
        return call("fake_quantize_backward", None, grad, x, scale, zero_point, *ctx.rest)


def _check_linear(mode: str, rest: tuple) -> None:
    estimator, delta = rest[2], rest[6]
    if estimator == "ewgs" and delta:
        raise RuntimeError(
            f"fake_quantize: 'ewgs' has no {mode} derivative, because its gradient depends on the sign of the incoming "
            "one; take another estimator, or delta=0"
        )


register(
    "fake_quantize",
    _FAKE_QUANTIZE,
    "Tensor",
    lambda x, *_: [(x.shape, x.dtype)],
    _check_fake_quantize,
    derivative=_FakeQuantizeDerivative,
)
register(
    "fake_quantize_backward",
    "Tensor grad, " + _FAKE_QUANTIZE,
    "(Tensor, Tensor, Tensor)",
    _gradients,
    _check_fake_quantize_backward,
    derivative=_FakeQuantizeSecondDerivative,
)


# -- rotation --------------------------------------------------------------------------------------------------------


def hadamard_transform(x: Tensor, transpose: bool = False, *, out: Tensor | None = None) -> Tensor:
    """Multiply every row by an orthonormal Hadamard matrix T, or by its transpose: `[..., n] -> T x`. Differentiable.

    Widths are `m * 2^k` with m = 1, 12, 20, 28, 36, 44 and further orders of `qkernels.hadamard`; others raise
    ValueError. T is not symmetric where m is of Paley's first kind (12, 20, 44). Linear maps keep their result when
    the same T turns x and the rows of the weight. Computed in float32, returned in x's dtype; T then the transpose is
    the identity to 1e-5.
    """
    return call("hadamard_transform", out, *_check_hadamard_transform(x, transpose))


def _check_hadamard_transform(x: Tensor, transpose: bool) -> tuple:
    op = "hadamard_transform"
    checks.rows(op, "x", x, FLOATS)
    if base_order(int(x.shape[-1])) is None:
        raise ValueError(
            f"{op}: no Hadamard matrix of width {x.shape[-1]} is known; widths are 2^k * 1, 12, 20, 28, 36, 44, ..."
        )
    return x, checks.flag(op, "transpose", transpose)


class _HadamardDerivative(Derivative):
    """Of a linear map: itself forward, its transpose in reverse, and so on in every order."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.transpose = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return call("hadamard_transform", None, grads[0], not ctx.transpose), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return call("hadamard_transform", None, tangents[0], ctx.transpose)


register(
    "hadamard_transform",
    "Tensor x, bool transpose",
    "Tensor",
    lambda x, transpose: [(x.shape, x.dtype)],
    _check_hadamard_transform,
    derivative=_HadamardDerivative,
)
