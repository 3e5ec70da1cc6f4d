"""Runs a tower's function from programs (`qkernels.recording`) while nothing asks for its modules.

A program is replayed only where the modules would do the same again: eval mode, no gradients, no hooks, no tracing, no
autocast, the same modules, parameters and settings as when it was recorded. Everything else runs the modules.

On a CPU a function is traced once for all batch sizes, and texts for all lengths (`Family` in `qkernels.recording`); a
shape's own program is derived from that when the shape comes again, and compared with the modules before it is used.
Where that is not possible, and on a GPU, a shape is recorded by itself. `admission.py` says when either is worth it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import cpu, dispatch, reference
from qkernels.recording import (
    Family,
    GraphProgram,
    NoRoomError,
    Program,
    UnrecordableError,
    Workspace,
    check,
    ledger,
    limit,
    record,
)

from .admission import GRAPHS, TOTAL, Counts, Entry, Shelf
from .guards import Guards


class _Thread(threading.local):
    """The workspace of a thread, which all its programs share."""

    def __init__(self) -> None:
        self.workspace = Workspace()


_thread = _Thread()


class _Recorded:
    """What the threads share as long as `guards` hold: families by the signature of the inputs that they take; None
    for one that cannot be."""

    def __init__(self, owner: nn.Module, below: Iterable[nn.Module]) -> None:
        self.guards = Guards(owner, below)
        self.families: dict[Hashable, Family | None] = {}


class Programs:
    """The programs of one function, for each thread, by the device and the shapes of its inputs."""

    def __init__(self) -> None:
        self._thread, self._starting, self._tracing = threading.local(), threading.Lock(), threading.Lock()
        self._recorded: _Recorded | None = None
        self.counts = Counts(TOTAL)
        self.refused: str | None = None  # why no program could be made, the last time that none could

    def __deepcopy__(self, memo: dict) -> Programs:
        return Programs()

    def __reduce__(self) -> tuple:
        return Programs, ()

    @property
    def programs(self) -> list[Program | GraphProgram]:
        """Those of this thread."""
        shelf = self._thread.__dict__.get("shelf")
        return [] if shelf is None else shelf.programs

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
        recorded = self._recorded
        if recorded is None or not recorded.guards.hold():
            with self._starting:  # one of several threads that see it
                recorded = self._recorded
                if recorded is None or not recorded.guards.hold():
                    recorded = self._recorded = _Recorded(owner, below)
        shelf = self._thread.__dict__.get("shelf")
        if shelf is None or shelf.made_for is not recorded:
            if shelf is not None:
                shelf.clear()
            shelf = self._thread.shelf = Shelf(recorded, self.counts, _thread.workspace)
        if recorded.guards.watched():
            return function(*inputs)
        inputs = tuple(t.contiguous() if _is_text(t) else t for t in inputs)
        entry = shelf.entry(_signature(inputs, settings))
        if entry.program is not None:
            shelf.earn()
            return entry.program(*inputs)
        if entry.uses >= entry.tried:
            return self._prepare(shelf, entry, function, inputs, settings)
        self.counts.add("modules")
        return function(*inputs)

    def _prepare(
        self, shelf: Shelf, entry: Entry, function: Callable[..., Any], inputs: tuple[Tensor, ...], settings: Hashable
    ) -> Any:
        """The function's result, and from now on a program for this shape where that pays."""
        families = shelf.made_for.families  # type: ignore[attr-defined]
        for free in _free(inputs):
            signature = _signature(inputs, settings, free)
            if signature not in families and not self._trace(shelf, entry, function, inputs, free, signature):
                break
            family = families[signature]
            if family is not None:
                return self._derive(shelf, entry, function, inputs, family, len(free))
        else:
            if shelf.spend(entry, shelf.costs.record):
                return self._record(shelf, entry, function, inputs)
        self.counts.add("modules")
        return function(*inputs)

    def _trace(
        self,
        shelf: Shelf,
        entry: Entry,
        function: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        free: tuple[int, ...],
        signature: Hashable,
    ) -> bool:
        """Trace the function for all sizes of the `free` dimensions, unless another thread does. -> whether it is
        known now what comes of that"""
        if not self._tracing.acquire(blocking=False):
            return False
        try:
            families = shelf.made_for.families  # type: ignore[attr-defined]
            if signature in families:
                return True
            if not shelf.spend(entry, shelf.costs.trace * 2 ** len(free), shelf.worth(len(free)), len(free)):
                return False
            self.counts.add("recorded")
            try:
                families[signature] = Family(function, inputs, free)
            except UnrecordableError as error:
                families[signature], self.refused = None, str(error)
            return True
        finally:
            self._tracing.release()

    def _derive(
        self,
        shelf: Shelf,
        entry: Entry,
        function: Callable[..., Any],
        inputs: tuple[Tensor, ...],
        family: Family,
        sizes: int,
    ) -> Any:
        self.counts.add("modules")
        wanted = function(*inputs)
        if not shelf.spend(entry, shelf.costs.derive, sizes=sizes):
            return wanted

        def make() -> Program:
            program = family.program(*inputs, workspace=_thread.workspace)
            check(program, inputs, wanted)
            return program

        try:
            shelf.keep(entry, make)
            self.counts.add("derived")
        except NoRoomError as error:
            self.refused = str(error)
            shelf.refuse(entry, for_good=False)
        except UnrecordableError as error:  # what holds for small sizes does not for these: each by itself, then
            self.refused = str(error)
            families = shelf.made_for.families  # type: ignore[attr-defined]
            families.update((signature, None) for signature, f in list(families.items()) if f is family)
        return wanted

    def _record(self, shelf: Shelf, entry: Entry, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        on_gpu = inputs[0].device.type == "cuda"
        try:
            shelf.keep(
                entry,
                lambda: record(function, *inputs, workspace=None if on_gpu else _thread.workspace),
                GRAPHS if on_gpu else None,
            )
            self.counts.add("recorded")
        except UnrecordableError as error:
            self.refused = str(error)
            shelf.refuse(entry, for_good=not isinstance(error, NoRoomError))
            self.counts.add("modules")
            return function(*inputs)
        assert entry.program is not None
        shelf.earn()
        return entry.program(*inputs)


def _is_text(tensor: Tensor) -> bool:
    """Whether it looks like token ids `[B, L]`."""
    return tensor.dim() == 2 and tensor.dtype in (torch.int64, torch.int32)


def _free(inputs: tuple[Tensor, ...]) -> tuple[tuple[int, ...], ...]:
    """Dimensions whose size a family may leave open, the best choice first."""
    first = inputs[0]
    if len(inputs) != 1 or first.device.type != "cpu" or first.dim() < 2 or not first.is_contiguous():
        return ()
    return ((0, 1), (0,)) if _is_text(first) else ((0,),)


def _signature(inputs: tuple[Tensor, ...], settings: Hashable, free: tuple[int, ...] | None = None) -> Hashable:
    """What decides, besides the guards, which program takes these inputs: with `free`, which family."""
    device = inputs[0].device
    kinds: list[Hashable] = []
    for t in inputs:
        layout: Hashable = (t.shape, t.stride())
        if free is not None:
            layout = tuple(-1 if dim in free else size for dim, size in enumerate(t.shape))
        kinds.append((layout, t.dtype, t.storage_offset() * t.itemsize % 64))
    return settings, device, _kernels(device), free, *kinds


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


def counts(owner: nn.Module) -> dict[str, Any]:
    """How the calls of `owner` were run, by all threads (`Counts`), and `why`: the reason of the last refusal."""
    found = owner.__dict__.get("qclip_programs")
    return {} if found is None else {**found.counts.get(), "why": found.refused}


def process_counts() -> dict[str, int]:
    """The same for all functions of this process, with the bytes that programs hold on the CPU, and their limit."""
    return {**TOTAL.get(), "bytes": ledger.bytes, "limit": limit()}


def program_counts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """How the calls of a quantized model's towers were run so far, by all threads.

    -> {path of the module ("" is the model itself): {"recorded": traces, "derived": programs made of traces,
    "replayed": calls run from programs, "modules": calls run module by module, "dropped": programs that made room or
    were out of date, "refused": attempts that failed, "why": the last reason}, "process": the same of all models, and
    the "bytes" that programs hold on the CPU, and their "limit" (QKERNELS_PROGRAM_BYTES)}. Calls that can only run by
    modules (gradients, hooks, training) are not counted. Empty but for "process" where no tower is quantized.
    """
    found = {name: counts(m) for name, m in model.named_modules() if "qclip_programs" in m.__dict__}
    return found | {"process": process_counts()}


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
