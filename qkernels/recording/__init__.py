"""Programs: the op calls of a function, recorded once for given shapes and replayed without Python between them.

`record(function, *inputs)` runs the function once and notes what it does to tensors: calls of the native kernels, and
torch's own ops between them. Replaying gives the same numbers: native calls stand on a tape that runs without the
GIL, torch's ops are called as they were, constants are folded, and every tensor in between has its place in one
workspace. Three rewrites save memory traffic and change no bit: a residual is added in the epilogue of the linear op
before it, codes go to the VNNI kernels in the form that these multiply, and steps whose rows do not meet are played
tile by tile (`tiling.py`).

`Family(function, inputs, free)` traces a function once for all sizes of some dimensions, such as the batch
(`family.py`). Programs of a thread may share one workspace, and what all hold is bounded (`workspace.py`).

A program is good for inputs of the same shapes, dtypes and strides on one thread at a time, and only as long as the
function would do the same again: whoever replays it checks that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .cuda_graph import GraphProgram, capture
from .family import Family, trace
from .limits import UnrecordableError, same_numbers
from .tape import Program
from .workspace import LIMIT, NoRoomError, Workspace, ledger, limit

__all__ = [
    "LIMIT",
    "Family",
    "GraphProgram",
    "NoRoomError",
    "Program",
    "UnrecordableError",
    "Workspace",
    "capture",
    "check",
    "ledger",
    "limit",
    "record",
]


def record(function: Callable[..., Any], *inputs: Tensor, workspace: Workspace | None = None) -> Program | GraphProgram:
    """Run `function(*inputs)` and make a program of it: a tape on a CPU, a CUDA graph on a GPU. Grad mode must be off.

    `function` takes and gives plain tensors of one device (results may be nested in tuples, lists and dicts).
    `workspace`: shared with other programs of this thread, on a CPU. Raises UnrecordableError where the function does
    what cannot be replayed: random numbers, values read on the host, changes of tensors that it did not make.
    """
    if inputs and inputs[0].device.type == "cuda":
        return capture(function, *inputs)
    inputs = _apart(inputs)
    found, result = trace(function, inputs)
    program = Program(found.steps, [int(t.storage_offset()) for t in inputs], found.outputs, found.spec, workspace)
    check(program, inputs, result)
    return program


def check(program: Program, inputs: tuple[Tensor, ...], wanted: Any) -> None:
    """Raise UnrecordableError where a replay with `inputs` gives other numbers than `wanted`, bit by bit."""
    for was, now in zip(tree_flatten(wanted)[0], tree_flatten(program(*inputs))[0], strict=True):
        if isinstance(was, Tensor) and not (was.shape == now.shape and same_numbers(was, now)):
            raise UnrecordableError("a replay gave other numbers")


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
