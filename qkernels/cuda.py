"""The CUDA C++ backend: functions of the same names and arguments as in `qkernels.reference`, over `qkernels._cuda`.

Arguments were validated in `qkernels.ops`. A function takes every case that `supports` lets through. Work goes to the
current stream of the tensors' device; nothing here waits for it. No kernel here has been timed against `qkernels`'
Triton kernels yet, so this backend runs only where `QKERNELS_BACKEND=cuda` asks for it.
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
    """The shared library, its functions typed by the list that it carries. It loads without a driver."""
    assert _spec is not None and _spec.origin is not None, missing
    loaded = ctypes.CDLL(_spec.origin)
    for name in ("qk_cuda_ops", "qk_cuda_error_name", "qk_cuda_error_text"):
        getattr(loaded, name).restype = ctypes.c_char_p
    for line in loaded.qk_cuda_ops().decode().splitlines():
        name, parameters = re.fullmatch(r"(\w+)\((.*)\)", line).groups()  # type: ignore[union-attr]
        words = [parameter.rsplit(" ", 1)[0] for parameter in parameters.split(", ")]
        function = getattr(loaded, f"qk_cuda_{name}")
        function.argtypes = [ctypes.c_void_p if "*" in word else _C_TYPES[word] for word in words]
    return loaded


def _fail(name: str, code: int) -> NoReturn:
    text = _SENTENCES.get(code)
    if text is None:
        text = f"{library().qk_cuda_error_text(code).decode()} ({library().qk_cuda_error_name(code).decode()})"
    raise CudaError(name, code, text)


def launch(name: str, device: torch.device, *arguments: Any) -> None:
    """Call `qk_cuda_NAME` on the current stream of `device`. Raises CudaError with a sentence."""
    stream = torch.cuda.current_stream(device)
    code = getattr(library(), f"qk_cuda_{name}")(*arguments, stream.device.index, stream.cuda_stream)
    if code:
        _fail(name, code)


@functools.cache
def device_facts(index: int) -> tuple[tuple[int, int], int, int]:
    """(compute capability, multiprocessors, bytes of shared memory that a block may have) of a GPU."""
    facts = (ctypes.c_int * 4)()
    address = ctypes.addressof(facts)
    code = library().qk_cuda_device_facts(*(address + 4 * i for i in range(4)), index, None)
    if code:
        _fail("device_facts", code)
    return (facts[0], facts[1]), facts[2], facts[3]


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
    capability, _, _ = device_facts(torch.cuda.current_device() if device.index is None else device.index)
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, and this GPU has {capability[0]}.{capability[1]}"
    return None


_limits: dict[str, Callable[..., str | None]] = {}
