"""Runs a tower's function from programs (`qkernels.recording`) while nothing asks for its modules.

A program is replayed only where the modules would do the same again: eval mode, no gradients, no hooks, no tracing, no
autocast, the same modules, parameters and settings as when it was recorded. Everything else runs the modules.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import cpu, dispatch, reference
from qkernels.recording import GraphProgram, Program, UnrecordableError, record

from . import hooks

KEPT = 4  # programs per thread and function: each holds a workspace
SCALARS = (bool, int, float, str, type(None))


class Programs:
    """The programs of one function, for each thread, by the device and the shapes of its inputs.

    The first call with new shapes runs the modules, the second records, the ones after that replay.
    """

    def __init__(self) -> None:
        self._thread = threading.local()
        self.refused: str | None = None  # why a recording failed, if one did

    def __deepcopy__(self, memo: dict) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple:
        return Programs, ()

    @property
    def programs(self) -> list[Program | GraphProgram]:
        """Those of this thread."""
        return [entry for entry in self._entries().values() if isinstance(entry, Program | GraphProgram)]

    def _entries(self) -> dict:
        return self._thread.__dict__.setdefault("entries", {})

    def run(
        self,
        owner: nn.Module,
        below: Iterable[nn.Module],
        function: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        settings: Hashable = None,
    ) -> Any:
        if not _possible(inputs):
            return function(*inputs)
        entries, guards = self._entries(), self._thread.__dict__.get("guards")
        if guards is None or not guards.hold():
            entries.clear()
            guards = self._thread.guards = Guards(owner, below)
        if not guards.plain or (any(guards.hooks) and any(map(hooks.active, guards.hooks))):
            return function(*inputs)
        key = (
            settings,
            inputs[0].device,
            _kernels(inputs[0].device),
            *((t.shape, t.stride(), t.dtype, t.storage_offset() * t.itemsize % 64) for t in inputs),
        )
        entry = entries.pop(key, "new")
        if entry == "new":
            entry = "seen"
        elif entry == "seen":
            try:
                entry = record(function, *inputs)
            except UnrecordableError as error:
                self.refused, entry = str(error), None
        entries[key] = entry  # the latest comes last
        while len(entries) > KEPT:
            del entries[next(iter(entries))]
        return entry(*inputs) if isinstance(entry, Program | GraphProgram) else function(*inputs)


class Guards:
    """What a recording depends on besides its inputs: modules, parameters and their versions, hooks, settings."""

    def __init__(self, owner: nn.Module, below: Iterable[nn.Module]) -> None:
        found = [owner, *dict.fromkeys(m for top in below for m in top.modules() if m is not owner)]
        self.entries: list[tuple[dict, str, Any]] = []
        self.versions: list[tuple[Tensor, int]] = []
        self.places: list[tuple[Tensor, int]] = []  # setting `data` changes neither the object nor its version
        self.hooks = [m.__dict__[name] for m in found for name in hooks.FORWARD]
        for m in found:
            for group in (m._modules, m._parameters, m._buffers):
                self.entries += [(group, name, value) for name, value in group.items()]
            # Leaves are torch's and ours, whose settings are fixed; looking at them all would cost a tenth of a
            # millisecond.
            names = [n for n, v in m.__dict__.items() if isinstance(v, SCALARS) and n[0] != "_"] if m._modules else []
            self.entries += [(m.__dict__, name, m.__dict__.get(name)) for name in {*names, "training", "forward"}]
            tensors = [t for group in (m._parameters, m._buffers) for t in group.values() if t is not None]
            self.versions += [(t, t._version) for t in tensors if not t.is_inference()]
            self.places += [(t, t.data_ptr()) for t in tensors]
        self.plain = not any(m.training or "forward" in m.__dict__ for m in found)

    def hold(self) -> bool:
        for owner, name, value in self.entries:
            now = owner.get(name)
            if now is not value and (isinstance(value, Tensor | nn.Module) or now != value):
                return False
        return all(tensor._version == version for tensor, version in self.versions) and all(
            tensor.data_ptr() == place for tensor, place in self.places
        )


def _possible(inputs: tuple[Tensor, ...]) -> bool:
    device = inputs[0].device
    return (
        not torch.is_grad_enabled()
        and device.type in ("cpu", "cuda")
        and all(type(t) is Tensor and t.device == device and t.numel() > 0 for t in inputs)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled(device.type)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not nn.modules.module._global_forward_hooks
        and not nn.modules.module._global_forward_pre_hooks
        and os.environ.get("QKERNELS_PROGRAM") != "0"
        and _recordable(device)
    )


def _recordable(device: torch.device) -> bool:
    """Whether kernels run there whose calls can be recorded, and nobody else records them now."""
    if device.type == "cpu":
        return cpu.native is not None and dispatch.backend_for(device) is cpu
    return not torch.cuda.is_current_stream_capturing() and dispatch.backend_for(device) is not reference


def _kernels(device: torch.device) -> Hashable:
    """What decides which kernels run there."""
    if device.type == "cpu":
        return torch.get_num_threads(), cpu.native.tier()
    return dispatch.backend_for(device).__name__


def enable(owner: nn.Module) -> None:
    """From now on `run(owner, ...)` uses programs. Straight into __dict__: no child, not in the state dict."""
    owner.__dict__.setdefault("qclip_programs", Programs())


def disable(owner: nn.Module) -> None:
    owner.__dict__.pop("qclip_programs", None)


def programs(owner: nn.Module) -> list[Program | GraphProgram]:
    """What this thread has recorded of `owner`."""
    found = owner.__dict__.get("qclip_programs")
    return [] if found is None else found.programs


def run(
    owner: nn.Module,
    function: Callable[..., Any],
    *inputs: Tensor,
    below: Iterable[nn.Module] | None = None,
    settings: Hashable = None,
) -> Any:
    """`function(*inputs)`, which reads `owner`'s own tensors and settings and the modules `below` it (default: all).

    `settings`: what else decides what the function does.
    """
    programs = owner.__dict__.get("qclip_programs")
    if programs is None:
        return function(*inputs)
    return programs.run(owner, (owner,) if below is None else below, function, inputs, settings)
