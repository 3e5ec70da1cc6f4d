"""The CPU backend: functions of the same names and arguments as in `qkernels.reference`, over `qkernels._native`.

Arguments were validated in `qkernels.ops`. Float inputs may be float32, bfloat16 or float16. A function takes every
case that `supports` lets through.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qkernels import reference
from qkernels.contract import ESTIMATORS
from qkernels.granularity import learned, new_gradients, sharing
from qkernels.hadamard import base_matrix, base_order
from qkernels.weights import Int4Weight, Int8Weight


class _Native:
    """The native functions. What a thread calls while it records (`noting`) is noted, with its arguments."""

    def __init__(self, module: Any) -> None:
        self.module, self._thread = module, threading.local()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)
        note = getattr(self._thread, "note", None)
        if note is None or name not in self.module.ops:
            return function

        def noted(*arguments: Any) -> Any:
            note(name, arguments)
            return function(*arguments)

        return noted

    @contextlib.contextmanager
    def noting(self, note: Callable[[str, tuple], None]) -> Iterator[None]:
        """Within it, `note(name, arguments)` hears of each native call of this thread."""
        self._thread.note = note
        try:
            yield
        finally:
            self._thread.note = None


# Found or not, never "found but broken": an extension that fails to import raises.
native: Any = None
if importlib.util.find_spec("qkernels._native"):
    native = _Native(importlib.import_module("qkernels._native"))
missing: str | None = None
if native is None:
    missing = "qkernels was installed without its native code (no C++ compiler was found; install g++ and reinstall)"

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # QkType in csrc/cpu/ops.h
ACTIVATIONS = {None: 0, "gelu": 1, "quick_gelu": 2, "gelu_tanh": 3}

_tier_wanted: str | None = None


def use_tier(name: str | None) -> None:
    """Run `name` (see `dispatch.TIERS`) from now on; None means the best one.

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
    def limits(x: Tensor, x_scale: Tensor | None, weight: Int8Weight | Int4Weight, *_: Any, **__: Any) -> str | None:
        if weight.layout != layout:
            return f"wants a weight in layout '{layout}', not '{weight.layout}' (call qkernels.pack(weight) once)"
        return None

    return limits


class _Epilogue:
    """The arguments that both linear ops end with, as the native functions take them; keeps their tensors alive."""

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
        results: Any = out
        codes, group_scales = results if out_group is not None else (results, None)
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
    x, scale, codes, scales = x.contiguous(), _floats(x_scale), weight.codes.contiguous(), _floats(weight.scales)
    end = _Epilogue(x.shape[:-1], n, bias, activation, residual, out_scale, out_zero_point, out_group, out_dtype, out)
    native.int8_linear(
        x.data_ptr(),
        x.numel() // k,
        k,
        k,
        0,
        _address(scale),
        _scale_kind(x, x_scale),
        _address(codes),
        _address(scales),
        n,
        *end.arguments,
    )
    return end.result


def quantize_per_token(
    x: Tensor,
    smooth: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.quantize_per_token`."""
    x, k = x.contiguous(), x.shape[-1]
    codes, scales = out = _rows(x) if out is None else out
    native.quantize_per_token(
        x.data_ptr(),
        TYPES[x.dtype],
        x.numel() // k,
        k,
        _address(smooth),
        _address(scale),
        _address(zero_point),
        codes.data_ptr(),
        k,
        0,
        scales.data_ptr(),
        torch.get_num_threads(),
    )
    return out


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
    """See `qkernels.ops.quantize_patches`. Images whose lines are contiguous are read in place."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, channels, lines, columns = x.shape
    down, across, k = lines // height, columns // width, channels * height * width
    if out is None:
        out = torch.empty(batch, down * across, k, dtype=torch.int8), torch.empty(batch, down * across)
    codes, scales = out
    native.quantize_patches(
        *(x.data_ptr(), TYPES[x.dtype], batch, channels, down, across, height, width, *x.stride()[:3]),
        *(_address(smooth), _address(scale), _address(zero_point), codes.data_ptr(), k, 0, scales.data_ptr()),
        torch.get_num_threads(),
    )
    return out


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
    """See `qkernels.ops.layer_norm_quantize`."""
    x, k, weight, bias = x.contiguous(), x.shape[-1], _floats(weight), _floats(bias)
    codes, scales = out = _rows(x) if out is None else out
    native.layer_norm_quantize(
        x.data_ptr(),
        TYPES[x.dtype],
        x.numel() // k,
        k,
        _address(weight),
        _address(bias),
        eps,
        _address(smooth),
        _address(scale),
        _address(zero_point),
        codes.data_ptr(),
        k,
        0,
        scales.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[:-1], dtype=torch.float32)


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
    """See `qkernels.ops.attention`. Strided tensors are read in place where the values of a head lie together."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    (batch, queries, heads, d), keys = q.shape, k.shape[1]
    if mask is not None:
        if mask.dtype != torch.bool:
            mask = mask.float()
        mask = mask.expand(*mask.shape[:-1], keys)
        if mask.stride(-1) != 1:
            mask = mask.contiguous()
        mask = mask.expand(batch, heads, queries, keys)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype if out_scale is None and not out_dynamic else torch.int8)
        out = (out, torch.empty(batch, queries, dtype=torch.float32)) if out_dynamic else out
    results: Any = out
    y, scales = results if out_dynamic else (results, None)
    native.attention(
        *(q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3], TYPES[q.dtype]),
        *(batch, queries, keys, heads, d),
        *((0, 0, 0, 0, 0) if mask is None else (mask.data_ptr(), int(mask.dtype == torch.bool), *mask.stride()[:3])),
        int(causal),
        d**-0.5 if scale is None else scale,
        *(y.data_ptr(), heads * d * y.element_size(), 0, TYPES[y.dtype]),
        _address(out_scale),
        int(out_scale is not None and out_scale.dim() == 2),
        _address(scales),
        torch.get_num_threads(),
    )
    return out


def channel_absmax(x: Tensor, running: Tensor | None = None, *, out: Any = None) -> Any:
    """See `qkernels.ops.channel_absmax`."""
    x, k = x.contiguous(), x.shape[-1]
    top = running
    if top is None:
        top = torch.zeros(k) if out is None else out.zero_()
    native.channel_absmax(x.data_ptr(), TYPES[x.dtype], x.numel() // k, k, top.data_ptr(), torch.get_num_threads())
    return top if running is None else None


def smooth_scale(act_absmax: Tensor, weight_absmax: Tensor, strength: float, *, out: Any = None) -> Any:
    """See `qkernels.ops.smooth_scale`. A few hundred numbers: torch's own vector functions."""
    return reference.smooth_scale(act_absmax, weight_absmax, strength, out=out)


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
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    if x.numel():
        native.fake_quantize(
            *(x.data_ptr(), TYPES[x.dtype], *sharing(x, scale, axis, group), scale.data_ptr(), _address(zero_point)),
            *(qmin, qmax, ESTIMATORS.index(estimator), out.data_ptr(), torch.get_num_threads()),
        )
    return out


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
    """See `qkernels.reference.fake_quantize_backward`."""
    grad, x = grad.contiguous(), x.contiguous()
    has = learned(zero_point, estimator)
    out = new_gradients(x, scale, has) if out is None else out
    dx, dscale, doffset = out
    if not x.numel():
        dscale.zero_()
        doffset.zero_()
    else:
        native.fake_quantize_backward(
            *(grad.data_ptr(), x.data_ptr(), TYPES[x.dtype], *sharing(x, scale, axis, group)),
            *(scale.data_ptr(), _address(zero_point), qmin, qmax, ESTIMATORS.index(estimator), grad_scale),
            *(delta / (qmax - qmin), dx.data_ptr(), dscale.data_ptr(), doffset.data_ptr() if has[1] else 0),
            torch.get_num_threads(),
        )
    return out


def hadamard_transform(x: Tensor, transpose: bool = False, *, out: Any = None) -> Any:
    """See `qkernels.ops.hadamard_transform`."""
    x, n = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x) if out is None else out
    m = base_order(n)
    assert m is not None
    base = base_matrix(m).float()
    base = base.t().contiguous() if transpose else base
    native.hadamard_transform(
        *(x.data_ptr(), TYPES[x.dtype], x.numel() // n, m, n // m, base.data_ptr(), n**-0.5, out.data_ptr()),
        torch.get_num_threads(),
    )
    return out


def int4_linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Int4Weight,
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
    """See `qkernels.ops.int4_linear`. The weight must be in layout `nibble64`."""
    n, k = weight.shape
    x, scale, codes, scales = x.contiguous(), _floats(x_scale), weight.codes.contiguous(), weight.scales.contiguous()
    zeros = None if weight.zeros is None else weight.zeros.contiguous()
    end = _Epilogue(x.shape[:-1], n, bias, activation, residual, out_scale, out_zero_point, out_group, out_dtype, out)
    native.int4_linear(
        x.data_ptr(),
        TYPES[x.dtype],
        x.numel() // k,
        k,
        k * x.element_size(),
        0,
        _address(scale),
        0 if x_scale is None else _scale_kind(x, x_scale),
        _address(codes),
        _address(scales),
        _address(zeros),
        n,
        weight.group,
        *end.arguments,
    )
    return end.result


def peak_gops(threads: int | None = None) -> float:
    """Measured limit of the tier's int8 dot products in 10^9 operations a second, without memory traffic.

    A multiply-add is two operations. Takes about 0.1 s on `threads` threads (default: torch's). Raises RuntimeError
    where the native code is missing.
    """
    if native is None:
        raise RuntimeError(f"no peak can be measured: {missing}")
    result = torch.zeros((), dtype=torch.float64)
    native.peak_int8(result.data_ptr(), threads or torch.get_num_threads())
    return float(result) / 1e9


# One line an op: what it cannot take. An op that is not here falls back.
_limits: dict[str, Any] = {
    "int8_linear": _packed("vnni64"),
    "int4_linear": _packed("nibble64"),
    "quantize_per_token": _always,
    "quantize_patches": _always,
    "layer_norm_quantize": _always,
    "attention": _always,
    "channel_absmax": _always,
    "smooth_scale": _always,
    "fake_quantize": _always,
    "fake_quantize_backward": _always,
    "hadamard_transform": _always,
}
