"""Watches a function run, and notes its steps: calls of native kernels, and torch's own ops between them."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from qkernels import cpu
from qkernels.abi import Parameters
from qkernels.registry import implementations

from .limits import UnrecordableError, check_plain, depends_on_values
from .steps import Made, Memory, NativeStep, Pointer, Step, TorchStep, View

UNFILLED = {"aten::empty", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided", "aten::empty_like"}


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What a schema says of an op of torch. Asking it takes longer than most ops."""

    name: str
    arguments: tuple[str, ...]
    changed: tuple[str, ...]  # arguments that it writes to
    decomposes: bool
    random: bool


@functools.cache
def _facts(function: Any) -> _Facts:
    arguments, name = function._schema.arguments, function._schema.name
    changed = tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    decomposes = not changed and name not in UNFILLED and function._can_decompose()
    random = torch.Tag.nondeterministic_seeded in function.tags
    return _Facts(name, tuple(a.name for a in arguments), changed, decomposes, random)


class Recorder(TorchDispatchMode):
    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.known: dict[int, tuple[Memory, StorageWeakRef]] = {}
        self.starts: list[int] = []  # sorted addresses of `known`
        self.parameters: dict[str, tuple[tuple[str, ...], str]] = {}
        for number, tensor in enumerate(inputs):
            self._enter(tensor, Memory("input", tensor.untyped_storage().nbytes(), number, tensor))

    def _enter(self, tensor: Tensor, memory: Memory) -> Memory:
        storage = tensor.untyped_storage()
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if storage.nbytes():  # what lay there before is gone
            at = bisect.bisect_left(self.starts, start)
            if at > 0 and self.starts[at - 1] + self.known[self.starts[at - 1]][0].size > start:
                at -= 1
            while at < len(self.starts) and self.starts[at] < end:
                del self.known[self.starts.pop(at)]
            self.starts.insert(at, start)
            self.known[start] = (memory, StorageWeakRef(storage))
        return memory

    def memory(self, tensor: Tensor) -> Memory:
        """The memory of `tensor`; one that nobody made here is a constant."""
        found = self._find(tensor)
        return found or self._enter(tensor, Memory("constant", tensor.untyped_storage().nbytes(), alive=tensor))

    def _find(self, tensor: Tensor) -> Memory | None:
        storage = tensor.untyped_storage()
        found = self.known.get(storage.data_ptr())
        if found is None or found[1].expired() or found[1] != StorageWeakRef(storage):
            return None
        return found[0]

    def view(self, tensor: Tensor) -> View:
        offset = int(tensor.storage_offset())
        return View(self.memory(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride(), offset)

    def _result(self, tensor: Tensor) -> View:
        """What a step made: one without elements (batch norm gives two) has no place by which it could be found."""
        memory = self._find(tensor) or Memory("temporary", 0)
        return View(memory, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def pointer(self, address: int) -> Pointer | None:
        if address == 0:
            return None
        at = bisect.bisect_right(self.starts, address) - 1
        if at >= 0:
            memory, reference = self.known[self.starts[at]]
            if address < self.starts[at] + memory.size and not reference.expired():
                return Pointer(memory, address - self.starts[at])
        raise UnrecordableError("a kernel got memory of which nothing is known")

    def note(self, name: str, arguments: tuple) -> None:
        """A native call is about to run."""
        if name not in self.parameters:
            text, kinds = cpu.native.module.parameters(name)
            self.parameters[name] = (Parameters(text).names, kinds)
        names, kinds = self.parameters[name]
        given = {n: self.pointer(a) if kind in "rw" else a for n, kind, a in zip(names, kinds, arguments, strict=True)}
        self._add(NativeStep(name, given, dict(zip(names, kinds, strict=True))))

    def _add(self, step: Step) -> None:
        for memory, written in step.touched():
            if written and memory.kind != "temporary":
                raise UnrecordableError(f"it changes a tensor that is not its own ({memory.kind})")
        self.steps.append(step)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        check_plain(tensors)
        kinds = {self.memory(t).kind for t in tensors}
        facts = _facts(function)
        name = facts.name
        if function.namespace == "qkernels":
            with self:  # the kernels are called below, beside torch's ops that prepare their arguments
                return implementations[name.removeprefix("qkernels::")](*args, **kwargs)
        if facts.decomposes:
            with self:
                return function.decompose(*args, **kwargs)
        if facts.random:
            raise UnrecordableError(f"it draws random numbers ({name})")
        if facts.changed:
            given = dict(zip(facts.arguments, args, strict=False)) | kwargs
            views = [self.view(t) for n in facts.changed for t in tree_flatten(given[n])[0]]
            self._add(TorchStep(function, [self._argument(a) for a in flat], spec, [], views))
            return function(*args, **kwargs)
        if depends_on_values(function, tensors) and kinds - {"constant"}:
            raise UnrecordableError(f"it reads numbers out of a tensor ({name})")
        arguments = [self._argument(a) for a in flat]
        result = function(*args, **kwargs)
        results = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
        check_plain(results)
        new = [t for t in results if self._find(t) is None]
        if name in UNFILLED:
            for t in new:
                self._enter(t, Memory("temporary", t.untyped_storage().nbytes()))
        elif not kinds - {"constant"}:
            for index, t in enumerate(results):
                if self._find(t) is None:
                    self.memory(t).made = Made(function, arguments, spec, index)
        elif new and len(new) == len(results):
            for t in new:
                self._enter(t, Memory("temporary", t.untyped_storage().nbytes()))
            self._add(TorchStep(function, arguments, spec, [self._result(t) for t in results], []))
        elif new:
            raise UnrecordableError(f"{name} gives views and new tensors at once")
        return result

    def _argument(self, value: Any) -> Any:
        return self.view(value) if isinstance(value, Tensor) else value
