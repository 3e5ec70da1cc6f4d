"""The CPU backend: functions of the same names and arguments as in `qkernels.reference`, over `qkernels._native`.

Arguments were validated in `qkernels.ops`. Float inputs may be float32, bfloat16 or float16. A function takes every
case that `supports` lets through.

All ops stand in one file, long as it is: each is little more than one native call, and they share how to make it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qkernels import reference
from qkernels.abi import TYPES, Parameters, epilogue_arguments, floats, scale_kind, several
from qkernels.contract import ESTIMATORS, NO_EPILOGUE, Epilogue
from qkernels.granularity import granularity, learned, new_gradients
from qkernels.hadamard import base_matrix, base_order
from qkernels.weights import Int4Weight, Int8Weight


class _Note(threading.local):
    """The function that hears of each native call of a thread; None: nobody listens."""

    to: Callable[[str, tuple], None] | None = None


class _Native:
    """The native functions. While a thread records (`noting`), its calls are noted with their arguments."""

    def __init__(self, module: Any) -> None:
        self.module, self._note = module, _Note()
        for name in module.ops:  # found at once, where `__getattr__` would cost a microsecond per call
            setattr(self, name, self._noted(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def _noted(self, name: str) -> Callable[..., Any]:
        function, note = getattr(self.module, name), self._note

        def call(*arguments: Any) -> Any:
            if note.to is not None:
                note.to(name, arguments)
            return function(*arguments)

        return call

    @contextlib.contextmanager
    def noting(self, note: Callable[[str, tuple], None]) -> Iterator[None]:
        """Within it, `note(name, arguments)` hears of each native call of this thread."""
        self._note.to = note
        try:
            yield
        finally:
            self._note.to = None


# Found or not, never "found but broken": an extension that fails to import raises.
native: Any = None
if importlib.util.find_spec("qkernels._native"):
    native = _Native(importlib.import_module("qkernels._native"))
missing: str | None = None
if native is None:
    missing = "qkernels was installed without its native code (no C++ compiler was found; install g++ and reinstall)"

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


@functools.cache
def _parameters(op: str) -> Parameters:
    return Parameters(native.parameters(op)[0])


def _run(op: str, **arguments: Any) -> None:
    """Call a native op by the names of csrc/cpu/ops.def, on all of torch's threads."""
    arguments["threads"] = torch.get_num_threads()
    getattr(native, op)(*_parameters(op).words(arguments))


def _packed(layout: str) -> Any:
    def limits(x: Tensor, x_scale: Tensor | None, weight: Int8Weight | Int4Weight, *_: Any, **__: Any) -> str | None:
        if weight.layout != layout:
            return f"wants a weight in layout '{layout}', not '{weight.layout}' (call qkernels.pack(weight) once)"
        return None

    return limits


def pair_sums(weight: Int4Weight | Int8Weight) -> int:
    """How many sums of two products AVX2 adds up in 16 bits where this packed weight meets INT8 activations (more than
    six rows of them, or of 4 bits any): its kernels for 4 to 7 bits. 0: none, as on all other tiers."""
    if native is None or native.tier() != "avx2" or weight.layout not in ("vnni64", "nibble64"):
        return 0
    largest = 8 if isinstance(weight, Int4Weight) else int(weight.codes[-4:].clone().view(torch.int32))
    return native.pair_sums(largest)  # type: ignore[no-any-return]


def _epilogue(epilogue: Epilogue, out: Any) -> dict[str, Any]:
    arguments = epilogue_arguments(epilogue, out)
    arguments["out_scale_per_column"] = several(epilogue.out_scale)
    arguments["out_zero_point_per_column"] = several(epilogue.out_zero_point)
    return arguments


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Int8Weight,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.int8_linear`. The weight must be in layout `vnni64`."""
    n, k = weight.shape
    x = x.contiguous()
    out = epilogue.allocate(x.shape[:-1], n, x.device) if out is None else out
    _run(
        "int8_linear",
        x=x,
        m=x.numel() // k,
        k=k,
        x_stride=k,
        x_shifted=0,
        x_scale=floats(x_scale),
        x_scale_kind=scale_kind(x, x_scale),
        weight=weight.codes.contiguous(),
        weight_scale=floats(weight.scales),
        n=n,
        **_epilogue(epilogue, out),
    )
    return out


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
    _run(
        "quantize_per_token",
        x=x,
        type=TYPES[x.dtype],
        rows=x.numel() // k,
        k=k,
        smooth=smooth,
        scale=scale,
        zero_point=zero_point,
        codes=codes,
        codes_stride=k,
        shift=0,
        scales=scales,
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
    _run(
        "quantize_patches",
        x=x,
        type=TYPES[x.dtype],
        batch=batch,
        channels=channels,
        rows=down,
        columns=across,
        height=height,
        width=width,
        image_stride=x.stride(0),
        channel_stride=x.stride(1),
        line_stride=x.stride(2),
        smooth=smooth,
        scale=scale,
        zero_point=zero_point,
        codes=codes,
        codes_stride=k,
        shift=0,
        scales=scales,
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
    x, k, weight, bias = x.contiguous(), x.shape[-1], floats(weight), floats(bias)
    codes, scales = out = _rows(x) if out is None else out
    _run(
        "layer_norm_quantize",
        x=x,
        type=TYPES[x.dtype],
        rows=x.numel() // k,
        k=k,
        weight=weight,
        bias=bias,
        eps=eps,
        smooth=smooth,
        scale=scale,
        zero_point=zero_point,
        codes=codes,
        codes_stride=k,
        shift=0,
        scales=scales,
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
    q, k, v = (t if t.stride()[-1] == 1 else t.contiguous() for t in (q, k, v))
    (q_batch, q_token, q_head, _), (k_batch, k_token, k_head, _) = q.stride(), k.stride()
    v_batch, v_token, v_head, _ = v.stride()
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
    mask_strides = (0, 0, 0) if mask is None else mask.stride()[:3]
    _run(
        "attention",
        q=q,
        q_batch=q_batch,
        q_token=q_token,
        q_head=q_head,
        k=k,
        k_batch=k_batch,
        k_token=k_token,
        k_head=k_head,
        v=v,
        v_batch=v_batch,
        v_token=v_token,
        v_head=v_head,
        type=TYPES[q.dtype],
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        d=d,
        mask=mask,
        mask_is_bool=int(mask is not None and mask.dtype == torch.bool),
        mask_batch=mask_strides[0],
        mask_head=mask_strides[1],
        mask_row=mask_strides[2],
        causal=int(causal),
        scale=d**-0.5 if scale is None else scale,
        out=y,
        out_stride=heads * d * y.element_size(),
        shift=0,
        out_type=TYPES[y.dtype],
        out_scale=out_scale,
        out_scale_per_channel=int(out_scale is not None and out_scale.dim() == 2),
        scales=scales,
    )
    return out


def channel_absmax(x: Tensor, running: Tensor | None = None, *, out: Any = None) -> Any:
    """See `qkernels.ops.channel_absmax`."""
    x, k = x.contiguous(), x.shape[-1]
    top = running
    if top is None:
        top = torch.zeros(k) if out is None else out.zero_()
    _run("channel_absmax", x=x, type=TYPES[x.dtype], rows=x.numel() // k, k=k, top=top)
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
        _run(
            "fake_quantize",
            x=x,
            type=TYPES[x.dtype],
            **granularity(x, scale, axis, group)._asdict(),
            scale=scale,
            zero_point=zero_point,
            low=qmin,
            high=qmax,
            estimator=ESTIMATORS.index(estimator),
            out=out,
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
        _run(
            "fake_quantize_backward",
            grad=grad,
            x=x,
            type=TYPES[x.dtype],
            **granularity(x, scale, axis, group)._asdict(),
            scale=scale,
            zero_point=zero_point,
            low=qmin,
            high=qmax,
            estimator=ESTIMATORS.index(estimator),
            grad_scale=grad_scale,
            bend=delta / (qmax - qmin),
            dx=dx,
            dscale=dscale,
            doffset=doffset if has[1] else None,
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
    _run(
        "hadamard_transform",
        x=x,
        type=TYPES[x.dtype],
        rows=x.numel() // n,
        m=m,
        p=n // m,
        base=base,
        factor=n**-0.5,
        out=out,
    )
    return out


def int4_linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Int4Weight,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.int4_linear`. The weight must be in layout `nibble64`."""
    n, k = weight.shape
    x = x.contiguous()
    out = epilogue.allocate(x.shape[:-1], n, x.device) if out is None else out
    _run(
        "int4_linear",
        x=x,
        x_type=TYPES[x.dtype],
        m=x.numel() // k,
        k=k,
        x_stride=k * x.element_size(),
        x_shifted=0,
        x_scale=floats(x_scale),
        x_scale_kind=scale_kind(x, x_scale),
        codes=weight.codes.contiguous(),
        scales=weight.scales.contiguous(),
        zeros=None if weight.zeros is None else weight.zeros.contiguous(),
        n=n,
        group=weight.group,
        **_epilogue(epilogue, out),
    )
    return out


def peak_gops(threads: int | None = None) -> float:
    """Measured limit of the tier's int8 dot products in 10^9 operations per second, without memory traffic.

    A multiply-add is two operations. Takes about 0.1 s on `threads` threads (default: torch's). Raises RuntimeError
    where the native code is missing.
    """
    if native is None:
        raise RuntimeError(f"no peak can be measured: {missing}")
    result = torch.zeros((), dtype=torch.float64)
    native.peak_int8(result.data_ptr(), threads or torch.get_num_threads())
    return float(result) / 1e9


# One line per op: what it cannot take. An op that is not here falls back.
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
