"""The ops as torch knows them: their schemas, the shapes of their results for tracing, and what belongs to them: their
checks (`qkernels.arguments`) and derivatives. Importing this module registers them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments, checks, derivatives, dispatch
from .contract import Epilogue
from .granularity import learned
from .registry import library, register, untraced
from .transforms import below_autograd
from .weights import Int4Weight, Int8Weight


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
    arguments.quantize_per_token,
)
register(
    "quantize_patches",
    "Tensor x, int height, int width, Tensor? smooth, Tensor? scale, Tensor? zero_point",
    "(Tensor, Tensor)",
    _patches_and_scales,
    arguments.quantize_patches,
)
register(
    "layer_norm_quantize",
    "Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? smooth, Tensor? scale, Tensor? zero_point",
    "(Tensor, Tensor)",
    _rows_and_scales,
    arguments.layer_norm_quantize,
)


_EPILOGUE = (
    "Tensor? bias, str? activation, Tensor? residual, Tensor? out_scale, Tensor? out_zero_point, "
    "int? out_group, ScalarType out_dtype"
)
register(
    "int8_linear",
    f"Tensor x, Tensor x_scale, Tensor codes, Tensor scales, SymInt n, SymInt k, str layout, {_EPILOGUE}",
    "Tensor[]",
    lambda x, x_scale, codes, scales, n, k, layout, *end: Epilogue(*end).results(x.shape[:-1], n),
    arguments.int8_linear,
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
    arguments.int4_linear,
    lambda x, x_scale, codes, scales, zeros, n, k, group, layout, *end: (
        x,
        x_scale,
        Int4Weight(codes, scales, zeros, (n, k), group, layout),
        Epilogue(*end),
    ),
)


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
    arguments.attention,
)


def _update_absmax(x: Tensor, running: Tensor) -> None:
    arguments.channel_absmax_(x, running)
    checks.apart("channel_absmax", [running], [x], "running")
    dispatch.select("channel_absmax", x.device, x, running)(x, running)
    torch.autograd.graph.increment_version(running)


def _update_absmax_once(x: Tensor, running: Tensor) -> None:
    """Maxima are statistics: they carry no gradient, whatever x asks for."""
    with below_autograd():
        torch.ops.qkernels.channel_absmax_(x, running)


register("channel_absmax", "Tensor x", "Tensor", lambda x: [(x.shape[-1:], torch.float32)], arguments.channel_absmax)
library.define("channel_absmax_(Tensor x, Tensor(a!) running) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
library.impl("channel_absmax_", untraced(_update_absmax), "CompositeExplicitAutograd")
library.impl("channel_absmax_", untraced(_update_absmax_once), "Autograd")
torch.library.register_fake("qkernels::channel_absmax_", lambda x, running: None, lib=library)
register(
    "smooth_scale",
    "Tensor act_absmax, Tensor weight_absmax, float strength",
    "Tensor",
    lambda act_absmax, weight_absmax, strength: [(act_absmax.shape, torch.float32)],
    arguments.smooth_scale,
)


def _gradients(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> list:
    has = learned(zero_point, rest[2])
    return [(x.shape, x.dtype), *((scale.shape if there else (0,), torch.float32) for there in has)]


_FAKE_QUANTIZE = (
    "Tensor x, Tensor scale, Tensor? zero_point, int qmin, int qmax, str estimator, "
    "int? axis, int? group, float grad_scale, float delta"
)
register(
    "fake_quantize",
    _FAKE_QUANTIZE,
    "Tensor",
    lambda x, *_: [(x.shape, x.dtype)],
    arguments.fake_quantize,
    derivative=derivatives.FakeQuantize,
)
register(
    "fake_quantize_backward",
    "Tensor grad, " + _FAKE_QUANTIZE,
    "(Tensor, Tensor, Tensor)",
    _gradients,
    arguments.fake_quantize_backward,
    derivative=derivatives.FakeQuantizeBackward,
)
register(
    "hadamard_transform",
    "Tensor x, bool transpose",
    "Tensor",
    lambda x, transpose: [(x.shape, x.dtype)],
    arguments.hadamard_transform,
    derivative=derivatives.Hadamard,
)
