"""Whether an op's kernels compile and start on a GPU, found out once for each op and device, before its first call.

Compiling needs more than triton: a C compiler for the launcher, a ptxas that knows the chip, a driver that loads what
comes out. Where one of them fails, `supports` says so and the fall-back is announced; the calls that follow a trial run
without a guard. The trial is one call on a few numbers, on the current stream; nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qkernels.weights import Int4Weight, Int8Weight

from .launch import on

_found: dict[tuple[str, torch.device], str | None] = {}


def failure(op: str, device: torch.device, function: Callable[[str], Callable[..., Any]]) -> str | None:
    """Why `op` cannot run on `device`, worded to follow "the triton backend", or None. `function(op)` is its
    launcher."""
    key = (op, device)
    if key not in _found:
        if torch.cuda.is_current_stream_capturing():
            return None  # nothing may be loaded now; whoever captures has run the op before
        _found[key] = _try(function, op, device)
    return _found[key]


def _try(function: Callable[[str], Callable[..., Any]], op: str, device: torch.device) -> str | None:
    arguments, out = _small(op, device)
    try:
        with on(out[0]):
            function(op)(*arguments, out=out[0] if len(out) == 1 else tuple(out))
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"could not compile its kernel on {device} ({type(error).__name__}: {lines[-1][:200]})"
    return None


def _small(op: str, device: torch.device) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """Arguments of a small call, as the backends take them, and its outputs."""

    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    int8 = torch.int8
    x, codes, row, one = ones(2, 32), ones(2, 32, dtype=int8), ones(2), ones()
    if op == "quantize_per_token":
        return (x,), [codes, row]
    if op == "quantize_patches":
        return (ones(1, 2, 4, 4), 4, 4), [ones(1, 1, 32, dtype=int8), ones(1, 1)]
    if op == "layer_norm_quantize":
        return (x, None, None, 1e-5), [codes, row]
    if op == "int8_linear":
        weight8 = Int8Weight(ones(16, 32, dtype=int8), ones(16), (16, 32)).pack("rows16")
        return (codes, one, weight8), [ones(2, 16)]
    if op == "int4_linear":
        scales = ones(16, 1, dtype=torch.float16)
        weight4 = Int4Weight(ones(16, 16, dtype=torch.uint8), scales, None, (16, 32), 32).pack("halves128")
        return (codes, one, weight4), [ones(2, 16)]
    if op == "attention":
        heads = ones(1, 2, 1, 16, dtype=torch.float16)
        return (heads, heads, heads), [heads.clone()]
    if op == "channel_absmax":
        return (x,), [ones(32)]
    if op == "smooth_scale":
        return (ones(32), ones(32), 0.5), [ones(32)]
    if op == "fake_quantize":
        return (x, one, None, -8, 7, "lsq"), [x.clone()]
    if op == "fake_quantize_backward":
        return (x, x, one, None, -8, 7, "lsq"), [x.clone(), ones(), ones(0)]
    if op == "hadamard_transform":
        return (x,), [x.clone()]
    raise ValueError(f"no trial of the op {op!r}")
