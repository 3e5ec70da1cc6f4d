"""The CUDA C++ backend: functions of the same names and arguments as in `qkernels.reference`, over `qkernels._cuda`.

Arguments were validated in `qkernels.ops`. A function takes every case that `supports` lets through. Work goes to the
current stream of the tensors' device; nothing here waits for it. No kernel here has been timed against `qkernels`'
Triton kernels yet, so this backend runs only where `QKERNELS_BACKEND=cuda` asks for it.

All ops stand in one file, long as it is: each is little more than one native call, and they share how to make it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from qkernels.abi import TYPES, Parameters, epilogue_arguments, floats, scale_kind, several
from qkernels.contract import ESTIMATORS, NO_EPILOGUE, Epilogue
from qkernels.granularity import Granularity, granularity, learned, new_gradients
from qkernels.weights import Int4Weight, Int8Weight

_spec = importlib.util.find_spec("qkernels._cuda")
missing: str | None = None
if _spec is None:
    missing = (
        "qkernels was installed without its CUDA kernels (no nvcc 12.5 or newer was found, or QKERNELS_CUDA=0 was set; "
        "install the CUDA toolkit and reinstall)"
    )

_C_TYPES = {"int": ctypes.c_int, "std::int64_t": ctypes.c_int64, "float": ctypes.c_float}
_SENTENCES = {
    1: "an argument was refused (cudaErrorInvalidValue)",
    2: "the GPU is out of memory; free some, or use a smaller batch",
    9: "the launch asks for more than this GPU has (cudaErrorInvalidConfiguration)",
    35: "the NVIDIA driver is missing or older than CUDA needs; install or update it",
    98: "this GPU has no code in the library (cudaErrorInvalidDeviceFunction); reinstall with an nvcc that knows it",
    100: "no NVIDIA GPU was found",
    209: "this GPU has no code in the library (cudaErrorNoKernelImageForDevice); reinstall with an nvcc that knows it",
    719: "a kernel failed on the GPU (cudaErrorLaunchFailure); results since the last synchronization are lost",
}


class CudaError(RuntimeError):
    """A call of the CUDA backend failed. `code` is the cudaError_t."""

    def __init__(self, name: str, code: int, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.code = code


@functools.cache
def library() -> Any:
    """The shared library. It loads without a driver."""
    assert _spec is not None and _spec.origin is not None, missing
    loaded = ctypes.CDLL(_spec.origin)
    for name in ("qk_cuda_error_name", "qk_cuda_error_text"):
        getattr(loaded, name).restype = ctypes.c_char_p
    functions(loaded)
    return loaded


def functions(loaded: Any) -> dict[str, Parameters]:
    """The functions of a library and their parameters, by the list that it carries; types those that it has."""
    loaded.qk_cuda_ops.restype = ctypes.c_char_p
    found = {}
    for line in loaded.qk_cuda_ops().decode().splitlines():
        name, parameters = re.fullmatch(r"(\w+)\((.*)\)", line).groups()  # type: ignore[union-attr]
        *own, _, _ = parameters.split(", ")  # the device's index and the stream come last
        found[name] = Parameters(", ".join(own))
        if hasattr(loaded, f"qk_cuda_{name}"):
            words = [parameter.rsplit(" ", 1)[0] for parameter in parameters.split(", ")]
            types = [ctypes.c_void_p if "*" in word else _C_TYPES[word] for word in words]
            getattr(loaded, f"qk_cuda_{name}").argtypes = types
    return found


@functools.cache
def _parameters(name: str) -> Parameters:
    return functions(library())[name]


def _fail(name: str, code: int) -> NoReturn:
    text = _SENTENCES.get(code)
    if text is None:
        text = f"{library().qk_cuda_error_text(code).decode()} ({library().qk_cuda_error_name(code).decode()})"
    raise CudaError(name, code, text)


def launch(name: str, device: torch.device, **arguments: Any) -> None:
    """Call `qk_cuda_NAME` on the current stream of `device`, by the names of csrc/cuda/ops.def. Raises CudaError with a
    sentence. torch's allocator gives the memory of tensors that are dropped after the call to later work of the same
    stream only."""
    stream, words = torch.cuda.current_stream(device), _parameters(name).words(arguments)
    code = getattr(library(), f"qk_cuda_{name}")(*words, stream.device.index, stream.cuda_stream)
    if code:
        _fail(name, code)


@functools.cache
def device_facts(index: int) -> tuple[tuple[int, int], int, int]:
    """(compute capability, multiprocessors, bytes of shared memory that a block may have) of a GPU."""
    major, minor, processors, shared = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    places = map(ctypes.addressof, (major, minor, processors, shared))
    code = library().qk_cuda_device_facts(*places, index, None)
    if code:
        _fail("device_facts", code)
    return (major.value, minor.value), processors.value, shared.value


def supports(op: str, *args: Any, **kwargs: Any) -> str | None:
    """None where this backend runs `op` with these arguments, else the reason, worded to follow "the cuda backend"."""
    x: Tensor = args[0]
    return unfit(op, x.device) or _limits[op](*args, **kwargs)


def unfit(op: str, device: torch.device) -> str | None:
    """Why this backend runs no call of `op` on `device`, worded as in `supports`; None where it does."""
    if op not in _limits:
        return "does not have this op"
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs, and these tensors are on '{device}'"
    return too_old(device)


def too_old(device: torch.device) -> str | None:
    """Why no kernel runs on this GPU, worded as in `supports`; None where it is new enough."""
    capability, _, _ = device_facts(torch.cuda.current_device() if device.index is None else device.index)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, and this GPU has {capability[0]}.{capability[1]}"
    return None


MOST_ROWS = 2**31 - 256  # most_rows in csrc/cuda/int8_linear.h
MOST_BLOCKS = 65535  # of a grid's second axis


def _epilogue(epilogue: Epilogue, out: Any) -> dict[str, Any]:
    return {**epilogue_arguments(epilogue, out), "out_scale_per_channel": several(epilogue.out_scale)}


def _rows16(x: Tensor) -> Tensor:
    """`[..., K]` of one byte per value as rows that begin at multiples of 16 bytes, as TMA and cp.async want them: x
    itself where it is so."""
    x = x.reshape(-1, x.shape[-1])
    k = x.shape[1]
    if x.stride(1) == 1 and x.stride(0) >= k and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return F.pad(x, (0, -k % 16))[:, :k] if k % 16 else x.clone(memory_format=torch.contiguous_format)


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Int8Weight,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    out: Any = None,
    configuration: int = -1,
) -> Any:
    """See `qkernels.ops.int8_linear`. The weight must be in layout `rows16`. `configuration` names one of csrc/cuda's,
    for measurements; -1 lets it choose."""
    n, k = weight.shape
    rows, codes = _rows16(x), _rows16(weight.codes)
    out = epilogue.allocate(x.shape[:-1], n, x.device) if out is None else out
    launch(
        "int8_linear",
        x.device,
        x=rows,
        m=rows.shape[0],
        k=k,
        x_pitch=rows.stride(0),
        x_scale=floats(x_scale),
        x_scale_kind=scale_kind(x, x_scale),
        codes=codes,
        code_pitch=codes.stride(0),
        w_scale=floats(weight.scales),
        n=n,
        **_epilogue(epilogue, out),
        configuration=configuration,
    )
    return out


def _rows_limits(x: Tensor, *_: Any, **__: Any) -> str | None:
    if x.numel() // x.shape[-1] > MOST_ROWS:
        return f"takes at most {MOST_ROWS} rows; split the batch"
    return None


def _linear_limits(layout: str, most_outputs: int) -> Callable[..., str | None]:
    def limits(x: Tensor, x_scale: Tensor | None, weight: Int8Weight | Int4Weight, *_: Any, **__: Any) -> str | None:
        if weight.layout != layout:
            return f"wants a weight in layout '{layout}', not '{weight.layout}' (call qkernels.pack(weight) once)"
        if weight.shape[0] > most_outputs:
            return f"takes at most {most_outputs} outputs; split the weight"
        if x.dtype == torch.float32:
            return "multiplies int8, bfloat16 and float16 x, not float32"
        return _rows_limits(x)

    return limits


def _int4_plan(m: int, n: int, k: int, splittable: bool) -> tuple[int, int, int]:
    """(tokens of a block, tiles, parts that K is cut into), from the shape alone, so that one shape has one order of
    sums on every GPU. About two blocks for each multiprocessor of a large GPU."""
    tokens = 16 if m <= 16 else 64
    tiles = -(-m // tokens) * -(-n // 128)
    splits = min(8, 256 // max(1, tiles), -(-k // 128)) if splittable else 1
    return tokens, tiles, max(1, splits)


def int4_linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Int4Weight,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    out: Any = None,
) -> Any:
    """See `qkernels.ops.int4_linear`. The weight must be in layout `halves128`, x of 8 or 16 bits."""
    n, k = weight.shape
    x = x.contiguous()
    zeros = None if weight.zeros is None else weight.zeros.contiguous()
    m, kind = x.numel() // k, scale_kind(x, x_scale)
    # Integer sums over all of K with a zero of their own are corrected at the end: they are not cut.
    whole = x.dtype == torch.int8 and kind != 2 and weight.group >= k
    tokens, tiles, splits = _int4_plan(m, n, k, not whole or zeros is None)
    partials = arrived = None
    if splits > 1:
        partials = torch.empty(tiles * splits * tokens * 128, dtype=torch.float32, device=x.device)
        arrived = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    out = epilogue.allocate(x.shape[:-1], n, x.device) if out is None else out
    launch(
        "int4_linear",
        x.device,
        x=x,
        type=TYPES[x.dtype],
        m=m,
        k=k,
        codes=weight.codes.contiguous(),
        scales=weight.scales.contiguous(),
        zeros=zeros,
        n=n,
        group=weight.group,
        x_scale=floats(x_scale),
        x_scale_kind=kind,
        **_epilogue(epilogue, out),
        tokens=tokens,
        splits=splits,
        partials=partials,
        arrived=arrived,
    )
    return out


def _rows(x: Tensor, out: Any) -> tuple[Tensor, Tensor]:
    """Where rows of codes and their scales go."""
    if out is not None:
        return out
    return torch.empty_like(x, dtype=torch.int8), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


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
    codes, scales = out = _rows(x, out)
    launch(
        "quantize_per_token",
        x.device,
        x=x,
        type=TYPES[x.dtype],
        rows=x.numel() // k,
        width=k,
        smooth=smooth,
        scale=scale,
        zero_point=zero_point,
        codes=codes,
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
    codes, scales = out = _rows(x, out)
    launch(
        "layer_norm_quantize",
        x.device,
        x=x,
        type=TYPES[x.dtype],
        rows=x.numel() // k,
        width=k,
        weight=weight,
        bias=bias,
        eps=eps,
        smooth=smooth,
        scale=scale,
        zero_point=zero_point,
        codes=codes,
        scales=scales,
    )
    return out


def _partials(grains: Granularity) -> int:
    """How many partial sums the gradient of a scale has (Layout::partials of fake_quantize.cu)."""
    if grains.by_columns:
        return -(-(grains.runs // grains.scales) // 64) * grains.scales
    return grains.runs * -(-grains.length // 1024)


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
        launch(
            "fake_quantize",
            x.device,
            x=x,
            type=TYPES[x.dtype],
            **granularity(x, scale, axis, group)._asdict(),
            scale=scale,
            zero_point=zero_point,
            qmin=qmin,
            qmax=qmax,
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
        return out
    grains = granularity(x, scale, axis, group)
    room = _partials(grains)
    partials = torch.empty(sum(has) * room, dtype=torch.float32, device=x.device)
    launch(
        "fake_quantize_backward",
        x.device,
        grad=grad,
        x=x,
        type=TYPES[x.dtype],
        **grains._asdict(),
        scale=scale,
        zero_point=zero_point,
        qmin=qmin,
        qmax=qmax,
        estimator=ESTIMATORS.index(estimator),
        grad_scale=grad_scale,
        delta=delta,
        dx=dx,
        dscale=dscale if has[0] else None,
        doffset=doffset if has[1] else None,
        partials=partials,
        room=room,
    )
    return out


def _column_limits(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    estimator: str,
    axis: int | None = None,
    group: int | None = None,
    *_: Any,
    **__: Any,
) -> str | None:
    most = MOST_BLOCKS * 32 * 16 // x.itemsize
    if x.numel() and (grains := granularity(x, scale, axis, group)).by_columns and grains.scales > most:
        return f"takes at most {most} columns with a scale each; split the tensor"
    return None


def _gradient_limits(grad: Tensor, *forward: Any, **options: Any) -> str | None:
    return _column_limits(*forward, **options)


# One line per op: what it cannot take. An op that is not here falls back.
_limits: dict[str, Callable[..., str | None]] = {
    "int8_linear": _linear_limits("rows16", MOST_ROWS),
    "int4_linear": _linear_limits("halves128", MOST_BLOCKS * 128),
    "quantize_per_token": _rows_limits,
    "layer_norm_quantize": _rows_limits,
    "fake_quantize": _column_limits,
    "fake_quantize_backward": _gradient_limits,
}
