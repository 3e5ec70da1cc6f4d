"""A recording as a tape of native calls, which runs without Python between them (csrc/cpu/program.h)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from qkernels import cpu

from . import tiling
from .limits import UnrecordableError
from .memory import place, place_arenas
from .steps import NativeStep, Pointer, Step, TorchStep, View, touching
from .workspace import Workspace, use_huge_pages

STEP_BYTES = 640  # of Python's objects per step, as measured with tracemalloc: what is counted for it in `own_bytes`


class Program:
    """A recorded function: `program(*inputs)` -> what the function returned, in new tensors. Not for two threads at
    once.

    `offsets`: of the recorded inputs in their storages, in elements. `workspace`: where its temporaries lie, which
    programs of one thread may share.
    """

    def __init__(
        self, steps: list[Step], offsets: list[int], outputs: list[Any], spec: Any, workspace: Workspace | None = None
    ) -> None:
        self._outputs, self._spec, self._offsets = outputs, spec, offsets
        self._threads, touched = torch.get_num_threads(), touching(steps, outputs)
        regions = tiling.regions(steps, lambda s: isinstance(s, NativeStep), touched, self._threads)
        for region in regions:
            tiling.settle(region, steps, touched)
        self._arena_bytes = place_arenas(steps, regions)
        self._arenas = place(steps, outputs, regions)
        self.workspace_bytes = self._arenas + self._threads * self._arena_bytes
        self._tape = cpu.native.Tape()
        self._patches: list[tuple[int, int, int, int]] = []  # step, argument, input, bytes
        self._places: list[tuple[int, int, int]] = []  # step, argument, bytes from the start of the workspace
        self._parts: list[Any] = []  # (begin, end) of the tape, a region of it, or a call of torch
        self._words = 0
        tiled = {number: region for region in regions for number in range(region.begin, region.end)}
        for number, step in enumerate(steps):
            if not isinstance(step, NativeStep):
                self._parts.append(_TorchCall(step))
            elif number in tiled:
                self._append(step, threads=1)
                if number == tiled[number].end - 1:
                    self._parts.append(self._tile(tiled[number], steps))
            else:
                self._append(step)
                if self._parts and isinstance(self._parts[-1], _Untiled):
                    self._parts[-1].end = len(self._tape)
                else:
                    self._parts.append(_Untiled(len(self._tape) - 1, len(self._tape)))
        # The tape knows addresses: it keeps the memory, which a tensor drops when somebody sets its `data`.
        constants = {id(m): m for s in steps for m, _ in s.touched() if m.kind == "constant"}.values()
        self._held = [m.alive.untyped_storage() for m in constants]
        self.own_bytes = 8 * self._words + STEP_BYTES * len(steps) + sum(m.size for m in constants if m.own)
        use_huge_pages(self._held)
        self._workspace = workspace or Workspace()
        self._workspace.enter(self)

    def bind(self, buffer: Tensor) -> None:
        """From now on temporaries lie in `buffer`, a workspace of enough bytes."""
        self._buffer, base = buffer, buffer.data_ptr()
        for step, argument, bytes_in in self._places:
            self._tape.set(step, argument, base + bytes_in)
        for part in self._parts:
            if isinstance(part, _TorchCall):
                part.bind(self)
        self._results = [
            self.tensor(o) if isinstance(o, View) and o.memory.kind != "input" else o for o in self._outputs
        ]

    def _append(self, step: NativeStep, threads: int | None = None) -> None:
        words: list[Any] = []
        number = len(self._tape)
        for position, (name, value) in enumerate(step.arguments.items()):
            if isinstance(value, Pointer) and value.memory.kind == "input":
                self._patches.append((number, position, value.memory.number, value.offset))
                words.append(0)
            elif isinstance(value, Pointer) and value.memory.kind == "temporary":
                self._places.append((number, position, self._place(value)))
                words.append(0)
            elif isinstance(value, Pointer):
                words.append(value.memory.alive.untyped_storage().data_ptr() + value.offset)
            elif step.kinds[name] in "rw":
                words.append(0)
            else:
                words.append(threads if threads and name == "threads" else value)
        self._tape.append(step.name, words)
        self._words += len(words)

    def _tile(self, region: tiling.FusedRegion, steps: list[Step]) -> _Tiled:
        """Tell the tape of a region whose steps it holds last."""
        shift = len(self._tape) - region.end
        numbers = []
        for segment in region.segments:
            changes = [
                (number + shift, list(steps[number].arguments).index(name), kind, stride)  # type: ignore[union-attr]
                for number, name, kind, stride in tiling.changes(segment, steps)
            ]
            numbers.append(
                self._tape.segment(segment.begin + shift, segment.end + shift, segment.rows, segment.bounds, changes)
            )
        return _Tiled(numbers[0], numbers[-1] + 1)

    def _place(self, pointer: Pointer) -> int:
        memory = pointer.memory
        end, room = memory.place + (memory.arena or memory.size), self._arena_bytes if memory.arena else self._arenas
        if end > room:  # a native call would write beyond it
            raise UnrecordableError(f"a temporary ends at byte {end} of {room}")
        return (self._arenas if memory.arena else 0) + memory.place + pointer.offset

    def tensor(self, view: View) -> Tensor:
        """The tensor that `view` stands for; not one over an input."""
        if view.memory.kind == "constant":
            return view.over(view.memory.alive.untyped_storage())
        return view.over(self._buffer.untyped_storage(), int(self._buffer.storage_offset()) + view.memory.place)

    def of_input(self, view: View, inputs: tuple[Tensor, ...]) -> Tensor:
        tensor = inputs[view.memory.number]
        offset = tensor.storage_offset() - self._offsets[view.memory.number] + view.offset
        return tensor.as_strided(view.size, view.stride, offset)

    def __call__(self, *inputs: Tensor) -> Any:
        for step, argument, number, offset in self._patches:
            tensor = inputs[number]
            moved = (tensor.storage_offset() - self._offsets[number]) * tensor.element_size()
            self._tape.set(step, argument, tensor.untyped_storage().data_ptr() + moved + offset)
        for part in self._parts:
            if isinstance(part, _Untiled):
                self._tape.run(part.begin, part.end)
            elif isinstance(part, _Tiled):
                self._tape.play(part.begin, part.end, self._threads, self._arena_bytes)
            else:
                part(self, inputs)
        found = [
            self.of_input(o, inputs).clone()
            if isinstance(o, View) and o.memory.kind == "input"
            else r.clone()
            if isinstance(r, Tensor)
            else r
            for o, r in zip(self._outputs, self._results, strict=True)
        ]
        return tree_unflatten(found, self._spec)

    def describe(self) -> dict[str, int]:
        """How many native calls it makes in how many pieces, how many calls of torch, and bytes of workspace."""
        pieces = sum(isinstance(part, _Untiled | _Tiled) for part in self._parts)
        return {
            "native": len(self._tape),
            "pieces": pieces,
            "torch": len(self._parts) - pieces,
            "workspace_bytes": self.workspace_bytes,
        }


@dataclasses.dataclass
class _Untiled:
    begin: int  # steps of the tape
    end: int


@dataclasses.dataclass
class _Tiled:
    begin: int  # segments of the tape
    end: int


class _TorchCall:
    """One of torch's ops with its tensors at their places; results go there at once where the op has an `out` form."""

    def __init__(self, step: TorchStep) -> None:
        self.step, self.spec = step, step.spec
        self.from_input = [k for k, a in enumerate(step.arguments) if isinstance(a, View) and a.memory.kind == "input"]
        self.function, self.names = _out_form(step.function, len(step.results))

    def bind(self, program: Program) -> None:
        """Make its tensors over the program's workspace."""
        self.arguments = [
            program.tensor(a) if isinstance(a, View) and k not in self.from_input else a
            for k, a in enumerate(self.step.arguments)
        ]
        self.results = [program.tensor(view) for view in self.step.results]
        self.out = dict(zip(self.names, self.results, strict=True)) if self.names else {}
        self.ready = None if self.from_input else tree_unflatten(self.arguments, self.spec)

    def __call__(self, program: Program, inputs: tuple[Tensor, ...]) -> None:
        if self.ready is None:
            flat: list[Any] = list(self.arguments)
            for k in self.from_input:
                flat[k] = program.of_input(flat[k], inputs)
            args, kwargs = tree_unflatten(flat, self.spec)
        else:
            args, kwargs = self.ready
        found = self.function(*args, **kwargs, **self.out)
        if self.results and not self.out:
            for place, result in zip(self.results, tree_flatten(found)[0], strict=True):
                place.copy_(result)


@functools.cache
def _out_form(function: Any, results: int) -> tuple[Any, list[str]]:
    """The overload of an op that writes to given tensors, and what it calls them; the op itself where there is none."""
    wanted = [(a.name, str(a.type)) for a in function._schema.arguments]
    if results:
        for overload in function.overloadpacket.overloads():
            form = getattr(function.overloadpacket, overload)
            arguments = form._schema.arguments
            out = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
            rest = [(a.name, str(a.type)) for a in arguments if a.name not in out]
            if len(out) == results and rest == [w for w in wanted if w in rest] and len(rest) == len(wanted):
                return form, out
    return function, []
