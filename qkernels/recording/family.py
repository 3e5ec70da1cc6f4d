"""One recording for all sizes of some dimensions: the batch, or the batch and the length of its texts.

A function is traced at the corners of a small box of sizes, 2 and 3 in each free dimension. Between the traces only
integers differ, and each of them is taken to be a polynomial in the free sizes that is linear in every single one (rows
are batch * tokens, a stride is length * width); the corners determine it. Steps for other sizes are then computed, not
traced, over the same constants. A function that goes another way at other sizes (it splits large batches) breaks
that rule where no corner sees it: whoever takes a program from here compares its first result with the function's.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from qkernels import cpu

from .limits import UnrecordableError
from .passes import rewrite
from .recorder import Recorder
from .steps import Memory, NativeStep, Pointer, Step, TorchStep, View
from .tape import Program
from .workspace import Workspace

CORNER = 2  # the smaller of the two sizes: with one image strides say nothing, and torch leaves copies out


@dataclasses.dataclass
class Trace:
    """What a function did to tensors: its steps, and the result that they led to."""

    steps: list[Step]
    outputs: list[Any]  # flat; Views stand for tensors
    spec: Any


def trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Trace, Any]:
    """Run `function(*inputs)` and note its steps, rewritten (`passes.py`). -> (trace, result)"""
    if torch.is_grad_enabled():
        raise UnrecordableError("gradients are on")
    if cpu.native is None:
        raise UnrecordableError("the native kernels are missing")
    recorder = Recorder(tuple(inputs))
    with recorder, cpu.native.noting(recorder.note):
        result = function(*inputs)
    flat, spec = tree_flatten(result)
    outputs = [recorder.view(value) if isinstance(value, Tensor) else value for value in flat]
    return Trace(rewrite(recorder.steps, outputs), outputs, spec), result


class Family:
    """The programs of `function` for inputs like `inputs` with any sizes of the `free` dimensions of the first one.

    The first input is contiguous. Raises UnrecordableError where the function cannot be recorded, or where its traces
    differ in more than integers.
    """

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...], free: tuple[int, ...]) -> None:
        self.free = free
        corners = itertools.product((CORNER, CORNER + 1), repeat=len(free))
        try:
            traces = [trace(function, (resized(inputs[0], free, sizes), *inputs[1:]))[0] for sizes in corners]
        except UnrecordableError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise UnrecordableError(f"it does not run with other batch sizes or lengths: {lines[0]}") from error
        first = traces[0]
        if any(len(t.steps) != len(first.steps) or t.spec != first.spec for t in traces):
            raise UnrecordableError("it takes other steps with other batch sizes")
        merge = _Merge(len(traces))
        self._steps = [merge.step(steps) for steps in zip(*(t.steps for t in traces), strict=True)]
        self._outputs = merge.value([t.outputs for t in traces])
        self._memories, self._spec = merge.memories, first.spec

    def program(self, *inputs: Tensor, workspace: Workspace | None = None) -> Program:
        """The program for the sizes of these inputs. Raises NoRoomError."""
        at = _At(self._memories, [inputs[0].shape[dim] - CORNER for dim in self.free])
        steps = [at.step(step) for step in self._steps]
        return Program(steps, [0] * len(inputs), at.value(self._outputs), self._spec, workspace)


def resized(tensor: Tensor, dims: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """`tensor` with these sizes: its first entries along each dimension, again and again where it has too few."""
    for dim, size in zip(dims, sizes, strict=True):
        tensor = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
    return tensor.contiguous()


@dataclasses.dataclass(frozen=True)
class _Size:
    """An integer that depends on the free sizes: sum over their subsets of coefficient * product of (size - CORNER)."""

    coefficients: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Place:
    """A Pointer or a View: over which memory, and its fields, in which a _Size may stand."""

    memory: int
    fields: tuple[Any, ...]


@dataclasses.dataclass
class _Remembered:
    """A Memory. One of kind "constant" is the same tensor for all sizes, or made anew by a call (`made`)."""

    kind: str
    size: Any
    number: int
    alive: Any = None
    made: tuple[Any, ...] | None = None  # function, arguments, spec, index


class _Merge:
    """Makes one of the traces of all corners."""

    def __init__(self, corners: int) -> None:
        self.memories: list[_Remembered] = []
        self._numbers: list[dict[int, int]] = [{} for _ in range(corners)]  # of each trace: id of a memory -> number

    def step(self, steps: Sequence[Step]) -> Any:
        first = steps[0]
        if any(type(s) is not type(first) for s in steps):
            raise UnrecordableError("it takes other steps with other batch sizes")
        if isinstance(first, NativeStep):
            if any(s.name != first.name for s in steps):  # type: ignore[union-attr]
                raise UnrecordableError("it calls other kernels with other batch sizes")
            merged = self.value([tuple(s.arguments.values()) for s in steps])  # type: ignore[union-attr]
            named: dict[str, Any] = dict(zip(first.arguments, merged, strict=True))  # type: ignore[arg-type]
            moving = {name: v for name, v in named.items() if isinstance(v, _Size | _Place)}
            return first.name, first.kinds, named, moving
        if any(s.function != first.function or s.spec != first.spec for s in steps):  # type: ignore[union-attr]
            raise UnrecordableError("it calls other ops of torch with other batch sizes")
        parts = [self.value([getattr(s, name) for s in steps]) for name in ("arguments", "results", "changed")]
        return first.function, first.spec, *parts

    def value(self, values: Sequence[Any]) -> Any:
        first = values[0]
        if any(type(v) is not type(first) for v in values):
            raise UnrecordableError("an argument has another type with other batch sizes")
        if isinstance(first, list | tuple):
            if any(len(v) != len(first) for v in values):
                raise UnrecordableError("a shape has more dimensions with other batch sizes")
            return tuple(self.value(v) for v in zip(*values, strict=True))
        if isinstance(first, Pointer):
            return _Place(self.memory([v.memory for v in values]), (self.value([v.offset for v in values]),))
        if isinstance(first, View):
            fields = (self.value([getattr(v, n) for v in values]) for n in ("dtype", "size", "stride", "offset"))
            return _Place(self.memory([v.memory for v in values]), tuple(fields))
        if all(v == first for v in values):
            return first
        if type(first) is not int:
            raise UnrecordableError("a number that is no integer changes with the batch size")
        found = list(values)
        for bit in (1 << i for i in range(len(found).bit_length() - 1)):
            for subset in range(len(found)):
                if subset & bit:
                    found[subset] -= found[subset ^ bit]
        return _Size(tuple(found))

    def memory(self, group: Sequence[Memory]) -> int:
        numbers = {known.get(id(m)) for known, m in zip(self._numbers, group, strict=True)}
        if len(numbers) != 1:
            raise UnrecordableError("other steps share memory with other batch sizes")
        number = numbers.pop()
        if number is None:
            remembered = self._remember(group)
            number = len(self.memories)
            self.memories.append(remembered)
            for known, m in zip(self._numbers, group, strict=True):
                known[id(m)] = number
        return number

    def _remember(self, group: Sequence[Memory]) -> _Remembered:
        first = group[0]
        if any((m.kind, m.number) != (first.kind, first.number) for m in group):
            raise UnrecordableError("an input, a constant and a temporary change places with other batch sizes")
        found = _Remembered(first.kind, self.value([m.size for m in group]), first.number)
        if first.kind != "constant":
            return found
        if len({m.alive.untyped_storage().data_ptr() for m in group}) == 1 and found.size == first.size:
            found.alive = first.alive
            return found
        made = [m.made for m in group]
        if first.made is None or any(
            m is None or (m.function, m.spec, m.index) != (first.made.function, first.made.spec, first.made.index)
            for m in made
        ):
            raise UnrecordableError("it reads other constants with other batch sizes")
        arguments = self.value([m.arguments for m in made])  # type: ignore[union-attr]
        if self._fixed(arguments):
            found.alive = first.alive
        else:
            found.made = first.made.function, arguments, first.made.spec, first.made.index
        return found

    def _fixed(self, value: Any) -> bool:
        if isinstance(value, tuple):
            return all(map(self._fixed, value))
        if isinstance(value, _Place):
            return self.memories[value.memory].made is None and self._fixed(value.fields)
        return not isinstance(value, _Size)


class _At:
    """Makes steps of merged ones, for given sizes."""

    def __init__(self, memories: list[_Remembered], distances: list[int]) -> None:
        self._factors = [1]
        for distance in reversed(distances):  # the last free dimension is the lowest bit of a corner's number
            self._factors += [factor * distance for factor in self._factors]
        self._memories: list[Memory] = []
        for m in memories:
            alive = m.alive if m.made is None else self._make(*m.made)
            size = self.value(m.size) if m.made is None else alive.untyped_storage().nbytes()
            self._memories.append(Memory(m.kind, size, m.number, alive, own=m.made is not None))

    def _make(self, function: Any, arguments: tuple[Any, ...], spec: Any, index: int) -> Tensor:
        flat = [self.value(a) for a in arguments]
        tensors = [a.over(a.memory.alive.untyped_storage()) if isinstance(a, View) else a for a in flat]
        args, kwargs = tree_unflatten(tensors, spec)
        return [v for v in tree_flatten(function(*args, **kwargs))[0] if isinstance(v, Tensor)][index]

    def step(self, merged: tuple[Any, ...]) -> Step:
        if isinstance(merged[0], str):
            name, kinds, named, moving = merged
            return NativeStep(name, named | {argument: self.value(v) for argument, v in moving.items()}, kinds)
        function, spec, *parts = merged
        arguments, results, changed = ([self.value(v) for v in part] for part in parts)
        return TorchStep(function, arguments, spec, results, changed)

    def value(self, value: Any) -> Any:
        kind = type(value)
        if kind is _Size:
            return sum(map(operator.mul, value.coefficients, self._factors))
        if kind is tuple:
            return tuple(map(self.value, value))
        if kind is _Place:
            memory, fields = self._memories[value.memory], map(self.value, value.fields)
            return Pointer(memory, *fields) if len(value.fields) == 1 else View(memory, *fields)
        return value
