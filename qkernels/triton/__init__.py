"""The Triton backend: one file per op, with its kernels, their configurations and the launcher of the reference's
signature.

Kernels run on NVIDIA GPUs of compute capability 8.0 and newer, or, where `TRITON_INTERPRET=1` was set before the
first import of triton, on CPU tensors by Triton's interpreter (for tests: slow). `import qkernels` does not import
triton; the first call of an op does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qkernels.weights import Int4Weight, Int8Weight

missing: str | None = None
if importlib.util.find_spec("triton") is None:
    missing = "triton is not installed (pip install triton)"

OLDEST = (8, 0)  # compute capability: int8 tensor cores with asynchronous copies

#: op -> the file that holds it
FILES = {
    "int8_linear": "int8_linear",
    "int4_linear": "int4_linear",
    "quantize_per_token": "quantize",
    "quantize_patches": "quantize",
    "layer_norm_quantize": "layer_norm",
    "attention": "attention",
    "channel_absmax": "statistics",
    "smooth_scale": "statistics",
    "fake_quantize": "fake_quantize",
    "fake_quantize_backward": "fake_quantize",
    "hadamard_transform": "hadamard",
}


def interpreted() -> bool:
    """Whether kernels run by the interpreter in this process, and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def function(op: str) -> Callable[..., Any]:
    """The function that runs `op`. Not an attribute of this package: some files bear the name of their op."""
    return getattr(_file(op), op)


def _file(op: str) -> Any:
    return importlib.import_module(f"{__name__}.{FILES[op]}")


@functools.cache
def _has_file(op: str) -> bool:
    return op in FILES and importlib.util.find_spec(f"{__name__}.{FILES[op]}") is not None


def compile_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where a kernel does not compile, or wants more of the chip than there is."""
    from triton.compiler.errors import CompilationError
    from triton.runtime import errors

    return CompilationError, errors.OutOfResources, errors.PTXASError


@functools.cache
def too_old(device: torch.device) -> str | None:
    """Why no kernel runs on this GPU, worded to follow "the triton backend"; None where it is new enough."""
    found = torch.cuda.get_device_capability(device)
    if found >= OLDEST:
        return None
    return f"needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, and {device} has {found[0]}.{found[1]}"


def unfit(op: str, device: torch.device) -> str | None:
    """Why this backend runs no call of `op` on `device`: it lacks the op, the GPU is too old, or the kernel does not
    compile there. None where it does; worded to follow "the triton backend"."""
    if not _has_file(op):
        return "does not have this op"
    if device.type != "cuda":
        return None
    from . import trial  # not with the package, which whoever has no GPU imports too

    return too_old(device) or trial.failure(op, device, function)


def supports(op: str, *args: Any, **kwargs: Any) -> str | None:
    """None where this backend runs `op` with these arguments, else the reason, worded to follow "the triton
    backend"."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    if tensors and (reason := unfit(op, tensors[0].device)):
        return reason
    for weight in args:
        if isinstance(weight, Int8Weight | Int4Weight):
            wanted = "rows16" if isinstance(weight, Int8Weight) else "halves128"
            if weight.layout != wanted:
                return f"wants a weight in layout '{wanted}', not '{weight.layout}' (call qkernels.pack(weight) once)"
    limits = getattr(_file(op), f"{op}_limits", None)  # what an op's file says beyond that
    return None if limits is None else limits(*args, **kwargs)
