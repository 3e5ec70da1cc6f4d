"""Device and environment -> backend, and what to say when a backend cannot take a case.

CPU tensors run on `cpu`, CUDA tensors on `triton`, and what they cannot take on `reference`, which is slow. Where
`cuda` is forced, `triton` runs what it cannot take.

Environment: `QKERNELS_BACKEND` (`reference`, `cpu`, `triton` or `cuda`) forces a backend, `QKERNELS_CPU_TIER` (one of
`TIERS`) forces the CPU tier, and `QKERNELS_STRICT=1` turns every fall-back to the reference into an error.
"""

from __future__ import annotations

import difflib
import functools
import os
import warnings
from collections.abc import Callable, Hashable, Iterable
from types import ModuleType
from typing import Any, TypeVar

import torch

from qkernels import cpu, cuda, reference, triton
from qkernels.contract import GROUP
from qkernels.weights import Int4Weight, Int8Weight, Weight

BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "triton": triton, "cuda": cuda}

TIERS = ("scalar", "avx2", "avxvnni", "avx512vnni", "neon")

Packable = TypeVar("Packable", bound=Weight)

_announced: set[str] = set()


class SettingError(ValueError):
    """An environment variable names a backend or a tier that is unknown or not there."""


class FallbackWarning(UserWarning):
    """A case runs on the slow reference backend."""


class FallbackError(RuntimeError):
    """A case would run on the reference backend, and `QKERNELS_STRICT=1` forbids it."""


def _setting(name: str) -> str | None:
    """What `os.environ.get(name)` gives now, in a tenth of its time, from the dictionary that it wraps: every call of
    an op asks twice, and `get` takes most of a microsecond to find that a name is missing."""
    value = os.environ._data.get(_keys[name])  # type: ignore[attr-defined]
    return None if value is None else os.environ.decodevalue(value)


_keys = {name: os.environ.encodekey(name) for name in ("QKERNELS_BACKEND", "QKERNELS_CPU_TIER")}


def _fall_back(message: str) -> None:
    """Say once that the reference runs, or raise under QKERNELS_STRICT=1."""
    if os.environ.get("QKERNELS_STRICT") == "1":
        raise FallbackError(f"{message} (QKERNELS_STRICT=1 makes this an error)")
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, FallbackWarning, stacklevel=3)


def _hint(name: str, known: Iterable[str]) -> str:
    """What may have been meant, to stand behind a sentence; nothing where `name` is known or near none."""
    close = [] if name in known else difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.4)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _use_tier() -> None:
    """Run the tier that the environment names, else the best one."""
    wanted = _setting("QKERNELS_CPU_TIER")
    try:
        cpu.use_tier(wanted)
    except ValueError as error:
        raise SettingError(f"QKERNELS_CPU_TIER={wanted}: {error}{_hint(str(wanted), TIERS)}") from None


def _choose(kind: str) -> tuple[ModuleType, str | None]:
    """The backend for tensors of a device type, and, where that is not the device's own, why."""
    forced = _setting("QKERNELS_BACKEND")
    if forced:
        if forced not in BACKENDS:
            raise SettingError(
                f"QKERNELS_BACKEND={forced} is not a backend of this version; known: {', '.join(BACKENDS)}"
                f"{_hint(forced, BACKENDS)}"
            )
        if forced == "cpu" and cpu.native is None:
            raise SettingError(f"QKERNELS_BACKEND=cpu, but {cpu.missing}")
        if forced == "cuda" and cuda.missing is not None:
            raise SettingError(f"QKERNELS_BACKEND=cuda, but {cuda.missing}")
        if forced == "triton" and triton.missing is not None:
            raise SettingError(f"QKERNELS_BACKEND=triton, but {triton.missing}")
        if forced == "triton" and kind == "cpu" and not triton.interpreted():
            raise SettingError(
                "QKERNELS_BACKEND=triton, but this tensor is on the CPU, where Triton's kernels run only by its "
                "interpreter; move it to a GPU, or set TRITON_INTERPRET=1 as well to test them"
            )
    if forced == "reference" or kind == "meta":
        return reference, None
    if forced == "triton" and kind == "cpu":
        return triton, None
    if forced == "cuda" and kind == "cuda":
        return cuda, None
    if forced == "cuda":
        return reference, f"QKERNELS_BACKEND=cuda has no kernels for device type '{kind}': the reference backend runs"
    if kind == "cuda" and forced != "cpu":
        if triton.missing is not None:
            return reference, f"{triton.missing}: the slow reference backend runs on the GPU"
        return triton, None
    if kind != "cpu":
        return (
            reference,
            f"qkernels has no kernels for device type '{kind}' in this version: the reference backend runs",
        )
    if cpu.native is None:
        return reference, f"{cpu.missing}: the slow reference backend runs"
    _use_tier()
    return cpu, None


def backend_for(device: torch.device | str) -> ModuleType:
    """The backend module that runs tensors of `device`: one of `BACKENDS`.

    Raises SettingError where the environment names an unknown backend or tier, or a backend that is not there.
    """
    backend, reason = _choose(device.type if isinstance(device, torch.device) else torch.device(device).type)
    if reason is not None:
        _fall_back(reason)
    return backend


def select(op: str, device: torch.device | str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The function that runs `op` with these arguments: the backend's, or the reference's where the backend says why it
    cannot.
    """
    backend = backend_for(device)
    if backend is cuda and cuda.supports(op, *args, **kwargs) is not None and triton.missing is None:
        backend = triton
    if backend is not reference:
        reason = backend.supports(op, *args, **kwargs)
        if reason is None:
            return _compiling(op) if backend is triton else getattr(backend, op)
        _fall_back(f"{op}: the {_name(backend)} backend {reason}; the reference backend runs")
    return getattr(reference, op)


_uncompilable: set[Hashable] = set()


@functools.cache
def _compiling(op: str) -> Callable[..., Any]:
    """Runs the Triton kernel of `op`, which is compiled at the first call for each kind of arguments. Where that fails,
    which `triton.unfit` cannot know beforehand, the reference runs, and later calls of that kind do not try again."""
    slow = getattr(reference, op)

    @functools.wraps(triton.function(op))
    def run(*args: Any, **kwargs: Any) -> Any:
        if _uncompilable and _kind(op, args, kwargs) in _uncompilable:
            return slow(*args, **kwargs)
        try:
            return triton.function(op)(*args, **kwargs)
        except triton.compile_errors() as error:
            lines = str(error).strip().splitlines() or [""]
            _fall_back(
                f"{op}: the triton backend could not compile its kernel for this call ({type(error).__name__}: "
                f"{lines[-1][:200]}); the reference backend runs"
            )
            _uncompilable.add(_kind(op, args, kwargs))
            return slow(*args, **kwargs)

    return run


def _kind(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What a kernel may be compiled for: shapes, dtypes and settings, not values."""

    def of(value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            return value.device, value.dtype, value.shape
        if isinstance(value, Int8Weight | Int4Weight):
            parts = value.codes, value.scales, getattr(value, "zeros", None)
            return value.shape, value.layout, getattr(value, "group", None), of(parts)
        return tuple(map(of, value)) if isinstance(value, tuple | list) else value

    return op, of(args), tuple((name, of(value)) for name, value in sorted(kwargs.items()))


def runner(op: str, device: torch.device | str) -> tuple[str, str | None]:
    """The name of the backend that runs `op` on `device` where nothing is special about its arguments, and, where that
    is not the device's own, why. Announces nothing."""
    device = torch.device(device)
    backend, reason = _choose(device.type)
    if backend is cuda and triton.missing is None and cuda.unfit(op, device):
        backend = triton
    if backend in (triton, cuda) and (unfit := backend.unfit(op, device)):
        backend, reason = reference, f"the {_name(backend)} backend {unfit}"
    return _name(backend), reason


def _name(backend: ModuleType) -> str:
    return backend.__name__.rpartition(".")[2]


def gpu() -> tuple[str | None, str | None]:
    """The backend that runs the linear ops on the current GPU and why it is not `triton`; (None, why) without a GPU."""
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        return None, "torch finds no NVIDIA GPU or no driver" if built else "this torch was built without CUDA"
    forced = os.environ.get("QKERNELS_BACKEND")
    name, reason = runner("int8_linear", torch.device("cuda", torch.cuda.current_device()))
    return name, reason or (f"QKERNELS_BACKEND={forced} forces it" if forced else None)


def layout_for(weight: Weight) -> str:
    """The layout that the backend of the weight's device wants: what `pack` makes."""
    on_gpu = ("rows16", "halves128")
    layouts = {cpu: ("vnni64", "nibble64"), triton: on_gpu, cuda: on_gpu}
    int8, int4 = layouts.get(backend_for(weight.codes.device), ("canonical", "canonical"))
    return int8 if isinstance(weight, Int8Weight) else int4


def pack(weight: Packable) -> Packable:
    """The weight in the layout that the backend of its device wants, bit for bit."""
    return weight.pack(layout_for(weight))  # type: ignore[return-value]


def _on_gpu_kernels(device: torch.device | str) -> bool:
    """Whether the linear ops and attention run as kernels on this GPU; without one (tracing) a new one is meant."""
    backend = backend_for(device)
    if backend not in (triton, cuda):
        return False
    return not torch.cuda.is_available() or backend.too_old(torch.device(device)) is None


@torch.compiler.assume_constant_result
def attention_dtype(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """In which dtype q, k and v should reach `attention` for its int8 output: bfloat16 instead of float32 on a GPU,
    whose tensor cores need three products for one of float32, and where the processor multiplies bfloat16 natively
    (twice as fast); the error stays below that of the int8 codes that follow. Models of 16 bits keep their dtype."""
    if dtype is not torch.float32:
        return dtype
    native = _on_gpu_kernels(device) or (backend_for(device) is cpu and cpu.native.has_bf16())
    return torch.bfloat16 if native else dtype


@torch.compiler.assume_constant_result
def output_group(device: torch.device | str) -> int | None:
    """How a linear op should hand its result to the next one where that quantizes its input dynamically: int8 with a
    scale for so many outputs each (`out_group`), or, for None, as floats that `quantize_per_token` then reads.

    A GPU's tile holds whole groups but no whole row, so groups save the pass between: 1 byte per value is moved instead
    of 5 (bfloat16) or 9 (float32), for one multiplication of the sums every 128 inputs. A CPU has the row in its cache.
    """
    return GROUP if _on_gpu_kernels(device) else None


def info() -> dict[str, Any]:
    """What was built and what runs.

    Keys: `built` (bool), `reason` (str or None: why there is no native code), `cuda` (None, or why there are no CUDA
    kernels), `tiers` (that this processor can run),
    `tier` (in use, or None), `bf16` (whether that tier has native bfloat16 products), `threads`, `backend` (for CPU
    tensors), `gpu_backend` (for tensors on the current GPU; None without one), `gpu_reason` (why it is that one, where
    there is something to say), `forced` (the environment's settings).
    """
    names = ("QKERNELS_BACKEND", "QKERNELS_CPU_TIER", "QKERNELS_STRICT")
    backend = "reference" if cpu.native is None else _name(_choose("cpu")[0])
    if cpu.native is not None:
        _use_tier()
    gpu_backend, gpu_reason = gpu()
    return {
        "built": cpu.native is not None,
        "reason": cpu.missing,
        "cuda": cuda.missing,
        "tiers": [] if cpu.native is None else list(cpu.native.tiers()),
        "tier": None if cpu.native is None else cpu.native.tier(),
        "bf16": cpu.native is not None and cpu.native.has_bf16(),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "gpu_backend": gpu_backend,
        "gpu_reason": gpu_reason,
        "forced": {name: os.environ[name] for name in names if name in os.environ},
    }
