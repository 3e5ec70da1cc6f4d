"""Programs: the op calls of a function, recorded once for given shapes and replayed without Python between them.

`record(function, *inputs)` runs the function once and notes what it does to tensors: calls of the native kernels, and
torch's own ops between them. Replaying gives the same numbers: native calls stand on a tape that runs without the
GIL, torch's ops are called as they were, constants are folded, and every tensor in between has its place in one
workspace. Three rewrites save memory traffic and change no bit: a residual is added in the epilogue of the linear op
before it, codes go to the VNNI kernels in the form that these multiply, and steps whose rows do not meet are played
tile by tile (`tiling.py`).

A program is good for inputs of the same shapes, dtypes and strides on one thread at a time, and only as long as the
function would do the same again: whoever replays it checks that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from qkernels import cpu

from .cuda_graph import GraphProgram, capture
from .limits import UnrecordableError, same_numbers
from .recorder import Recorder
from .tape import Program

__all__ = ["GraphProgram", "Program", "UnrecordableError", "capture", "record"]


def record(function: Callable[..., Any], *inputs: Tensor) -> Program | GraphProgram:
    """Run `function(*inputs)` and make a program of it: a tape on a CPU, a CUDA graph on a GPU. Grad mode must be off.

    `function` takes and gives plain tensors of one device (results may be nested in tuples, lists and dicts). Raises
    UnrecordableError where it does what cannot be replayed: random numbers, values read on the host, changes of tensors
    that it did not make.
    """
    if inputs and inputs[0].device.type == "cuda":
        return capture(function, *inputs)
    if torch.is_grad_enabled():
        raise UnrecordableError("gradients are on")
    if cpu.native is None:
        raise UnrecordableError("the native kernels are missing")
    inputs = _apart(inputs)
    recorder = Recorder(inputs)
    with recorder, cpu.native.noting(recorder.note):
        result = function(*inputs)
    flat, spec = tree_flatten(result)
    outputs = [recorder.view(value) if isinstance(value, Tensor) else value for value in flat]
    program = Program(recorder.steps, inputs, outputs, spec)
    again = tree_flatten(program(*inputs))[0]
    for was, now in zip(flat, again, strict=True):
        if isinstance(was, Tensor) and not same_numbers(was, now):
            raise UnrecordableError("a replay gave other numbers")
    return program


def _apart(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs over memory of their own: what shares memory now need not when the program is replayed."""
    seen: set[int] = set()
    found = []
    for tensor in inputs:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() in seen:
            with torch.inference_mode(False):
                tensor = torch.empty(0, dtype=tensor.dtype).set_(
                    storage.clone(), tensor.storage_offset(), tensor.size(), tensor.stride()
                )
        seen.add(storage.data_ptr())
        found.append(tensor)
    return tuple(found)
