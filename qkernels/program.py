"""Programs: the op calls of a function, recorded once for given shapes and replayed without Python between them.

`record(function, *inputs)` runs the function once and notes what it does to tensors: calls of the native kernels, and
torch's own ops between them. Replaying gives the same numbers: native calls stand on a tape that runs without the
GIL, torch's ops are called as they were, constants are folded, and every tensor in between has its place in one
workspace. Three rewrites save memory traffic and change no bit: a residual is added in the epilogue of the linear op
before it, codes go to the VNNI kernels in the form that these multiply, and steps whose rows do not meet are played
tile by tile (`qkernels.tiling`).

A program is good for inputs of the same shapes, dtypes and strides on one thread at a time, and only as long as the
function would do the same again: whoever replays it checks that (`qclip.models.programmed`).
"""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import cpu, tiling
from .registry import implementations

if TYPE_CHECKING:
    from .graphs import GraphProgram

ALIGN, PAGE = 64, 4096
PROCESS = os.getpid()  # that imported this
UNFILLED = {"aten::empty", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided", "aten::empty_like"}
SHIFTABLE = {
    "quantize_per_token": "codes",
    "layer_norm_quantize": "codes",
    "quantize_patches": "codes",
    "attention": "out",
}
LINEAR = ("int8_linear", "int4_linear")


class UnrecordableError(RuntimeError):
    """A function does something that cannot be replayed; the message says what."""


@dataclasses.dataclass
class Memory:
    """A storage that was seen. `temporary` ones get a place in the workspace."""

    kind: str  # "constant", "input", "temporary"
    size: int
    number: int = 0  # of the input
    alive: Any = None  # constants and inputs are kept
    first: int = -1  # steps between which a temporary holds something
    last: int = -1
    place: int = 0  # bytes from the start of the workspace, or of the arena
    arena: int = 0  # bytes in the arena of a tile, for one that lives there (qkernels/tiling.py)
    shares: Memory | None = None  # the one whose place it takes


@dataclasses.dataclass
class Pointer:
    memory: Memory
    offset: int  # bytes


@dataclasses.dataclass
class View:
    """A tensor over a memory."""

    memory: Memory
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements

    def whole(self) -> bool:
        """Contiguous, from the start of its memory to the end."""
        count = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and stride != count:
                return False
            count *= size
        return self.offset == 0 and count * self.dtype.itemsize == self.memory.size


@dataclasses.dataclass
class NativeStep:
    name: str
    arguments: dict[str, Any]  # numbers, and Pointers (None: a null pointer)
    kinds: dict[str, str]

    def touched(self) -> list[tuple[Memory, bool]]:
        """(memory, whether it is written)"""
        return [(p.memory, self.kinds[name] == "w") for name, p in self.arguments.items() if isinstance(p, Pointer)]


@dataclasses.dataclass
class TorchStep:
    function: Any  # an OpOverload
    arguments: list[Any]  # flat; Views stand for tensors
    spec: Any
    results: list[View]  # new tensors; none where an argument is changed in place
    changed: list[View]

    def touched(self) -> list[tuple[Memory, bool]]:
        reads = [(a.memory, False) for a in self.arguments if isinstance(a, View)]
        return reads + [(v.memory, True) for v in (*self.results, *self.changed)]


Step = NativeStep | TorchStep


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.known: dict[int, tuple[Memory, StorageWeakRef]] = {}
        self.starts: list[int] = []  # sorted addresses of `known`
        self.parameters: dict[str, tuple[list[str], str]] = {}
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
            self.parameters[name] = ([part.split()[-1].lstrip("*") for part in text.split(",")], kinds)
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
        _check_plain(tensors)
        kinds = {self.memory(t).kind for t in tensors}
        schema, name = function._schema, function._schema.name
        if function.namespace == "qkernels":
            with self:  # the kernels are called below, beside torch's ops that prepare their arguments
                return implementations[name.removeprefix("qkernels::")](*args, **kwargs)
        changed = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if not changed and function._can_decompose() and name not in UNFILLED:
            with self:
                return function.decompose(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise UnrecordableError(f"it draws random numbers ({name})")
        if changed:
            given = dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
            views = [self.view(t) for n in changed for t in tree_flatten(given[n])[0]]
            self._add(TorchStep(function, [self._argument(a) for a in flat], spec, [], views))
            return function(*args, **kwargs)
        if depends_on_values(function, tensors) and kinds - {"constant"}:
            raise UnrecordableError(f"it reads numbers out of a tensor ({name})")
        arguments = [self._argument(a) for a in flat]
        result = function(*args, **kwargs)
        results = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
        _check_plain(results)
        new = [t for t in results if self._find(t) is None]
        if name in UNFILLED:
            for t in new:
                self._enter(t, Memory("temporary", t.untyped_storage().nbytes()))
        elif not kinds - {"constant"}:
            for t in new:
                self.memory(t)
        elif new and len(new) == len(results):
            for t in new:
                self._enter(t, Memory("temporary", t.untyped_storage().nbytes()))
            self._add(TorchStep(function, arguments, spec, [self.view(t) for t in results], []))
        elif new:
            raise UnrecordableError(f"{name} gives views and new tensors at once")
        return result

    def _argument(self, value: Any) -> Any:
        return self.view(value) if isinstance(value, Tensor) else value


def _check_plain(tensors: list[Tensor]) -> None:
    if any(t.device.type != "cpu" or t.layout != torch.strided or type(t) not in PLAIN for t in tensors):
        raise UnrecordableError("it uses a tensor that is no plain one in host memory")


def depends_on_values(function: Any, tensors: list[Tensor]) -> bool:
    """Whether the result's shape, or a number on the host, depends on what is in the tensors."""
    if function._schema.name == "aten::index":  # by numbers it does not, by truth values it does
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))


PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def record(function: Callable[..., Any], *inputs: Tensor) -> Program | GraphProgram:
    """Run `function(*inputs)` and make a program of it: a tape on a CPU, a CUDA graph on a GPU. Grad mode must be off.

    `function` takes and gives plain tensors of one device (results may be nested in tuples, lists and dicts). Raises
    UnrecordableError where it does what cannot be replayed: random numbers, values read on the host, changes of tensors
    that it did not make.
    """
    if inputs and inputs[0].device.type == "cuda":
        from .graphs import capture

        return capture(function, *inputs)
    if torch.is_grad_enabled():
        raise UnrecordableError("gradients are on")
    if cpu.native is None:
        raise UnrecordableError("the native kernels are missing")
    inputs = _apart(inputs)
    recorder = _Recorder(inputs)
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


def same_numbers(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan())


class Program:
    """A recorded function: `program(*inputs)` -> what the function returned, in new tensors. Not for two threads at
    once."""

    def __init__(self, steps: list[Step], inputs: tuple[Tensor, ...], outputs: list[Any], spec: Any) -> None:
        if cpu.native.tier().endswith("vnni"):
            _hand_over_shifted(steps, outputs)
        steps = _add_residuals_in_place(steps, outputs)
        self._outputs, self._spec = outputs, spec
        self._offsets = [t.storage_offset() for t in inputs]
        self._threads, touching = torch.get_num_threads(), _touching(steps, outputs)
        stretches = tiling.stretches(steps, lambda s: isinstance(s, NativeStep), touching, self._threads)
        for stretch in stretches:
            tiling.settle(stretch, steps, touching)
        self._arena_bytes = _place_arenas(steps, stretches)
        self._arenas = _place(steps, outputs, stretches)
        self.workspace_bytes = self._arenas + self._threads * self._arena_bytes
        with torch.inference_mode(False):
            raw = torch.empty(self.workspace_bytes + ALIGN, dtype=torch.uint8)
        self._workspace = raw
        self._base = -(-raw.data_ptr() // ALIGN) * ALIGN
        self._tape = cpu.native.Tape()
        self._patches: list[tuple[int, int, int, int]] = []  # step, argument, input, bytes
        self._parts: list[Any] = []  # (begin, end) of the tape, a stretch of it, or a call of torch
        self._constants = [
            m.alive for m in {id(m): m for s in steps for m, _ in s.touched()}.values() if m.kind == "constant"
        ]
        tiled = {number: stretch for stretch in stretches for number in range(stretch.begin, stretch.end)}
        for number, step in enumerate(steps):
            if not isinstance(step, NativeStep):
                self._parts.append(_TorchCall(self, step))
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
        self._held = [t.untyped_storage() for t in (self._workspace, *self._constants)]
        if os.getpid() == PROCESS:  # a forked one would copy weights that it shares with its parent
            cpu.native.use_huge_pages([(storage.data_ptr(), storage.nbytes()) for storage in self._held])
        self._results = [self.tensor(o) if isinstance(o, View) and o.memory.kind != "input" else o for o in outputs]

    def _append(self, step: NativeStep, threads: int | None = None) -> None:
        words: list[Any] = []
        number = len(self._tape)
        for position, (name, value) in enumerate(step.arguments.items()):
            if isinstance(value, Pointer) and value.memory.kind == "input":
                self._patches.append((number, position, value.memory.number, value.offset))
                words.append(0)
            elif isinstance(value, Pointer) or step.kinds[name] in "rw":
                words.append(0 if value is None else self._address(value))
            else:
                words.append(threads if threads and name == "threads" else value)
        self._tape.append(step.name, words)

    def _tile(self, stretch: tiling.Stretch, steps: list[Step]) -> _Tiled:
        """Tell the tape of a stretch whose steps it holds last."""
        shift = len(self._tape) - stretch.end
        numbers = []
        for segment in stretch.segments:
            changes = [
                (number + shift, list(steps[number].arguments).index(name), kind, stride)  # type: ignore[union-attr]
                for number, name, kind, stride in tiling.changes(segment, steps)
            ]
            numbers.append(
                self._tape.segment(segment.begin + shift, segment.end + shift, segment.rows, segment.bounds, changes)
            )
        return _Tiled(numbers[0], numbers[-1] + 1)

    def _address(self, pointer: Pointer) -> int:
        memory = pointer.memory
        if memory.kind == "constant":
            return int(memory.alive.untyped_storage().data_ptr()) + pointer.offset
        return self._base + (self._arenas if memory.arena else 0) + memory.place + pointer.offset

    def tensor(self, view: View) -> Tensor:
        """The tensor that `view` stands for; not one over an input."""
        if view.memory.kind == "constant":
            storage, offset = view.memory.alive.untyped_storage(), view.offset
        else:
            storage = self._workspace.untyped_storage()
            start = self._base - self._workspace.data_ptr() + view.memory.place
            offset = start // view.dtype.itemsize + view.offset
            if start % view.dtype.itemsize:
                raise AssertionError("the workspace is misaligned")
        with torch.inference_mode(False):
            return torch.empty(0, dtype=view.dtype).set_(storage, offset, view.size, view.stride)

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
                part(inputs)
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

    def __init__(self, program: Program, step: TorchStep) -> None:
        self.program, self.spec = program, step.spec
        is_input = [isinstance(a, View) and a.memory.kind == "input" for a in step.arguments]
        self.arguments = [
            program.tensor(a) if isinstance(a, View) and not i else a
            for a, i in zip(step.arguments, is_input, strict=True)
        ]
        self.from_input = [k for k, i in enumerate(is_input) if i]
        self.results = [program.tensor(view) for view in step.results]
        self.function, names = _out_form(step.function, len(self.results))
        self.out = dict(zip(names, self.results, strict=True)) if names else {}
        self.ready = None if self.from_input else tree_unflatten(self.arguments, self.spec)

    def __call__(self, inputs: tuple[Tensor, ...]) -> None:
        if self.ready is None:
            flat: list[Any] = list(self.arguments)
            for k in self.from_input:
                flat[k] = self.program.of_input(flat[k], inputs)
            args, kwargs = tree_unflatten(flat, self.spec)
        else:
            args, kwargs = self.ready
        found = self.function(*args, **kwargs, **self.out)
        if self.results and not self.out:
            for place, result in zip(self.results, tree_flatten(found)[0], strict=True):
                place.copy_(result)


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


def _touching(steps: list[Step], outputs: list[Any]) -> dict[int, list[tuple[int, bool]]]:
    """Memory -> the steps that touch it, in order, and whether they write. An output counts as a step behind all."""
    found: dict[int, list[tuple[int, bool]]] = {}
    for number, step in enumerate(steps):
        for memory, written in step.touched():
            found.setdefault(id(memory), []).append((number, written))
    for view in outputs:
        if isinstance(view, View):
            found.setdefault(id(view.memory), []).append((len(steps), False))
    return found


def _hand_over_shifted(steps: list[Step], outputs: list[Any]) -> None:
    """Codes that nobody but VNNI linear ops reads are written as these want them: plus 128, rows a cache line apart."""
    touching = _touching(steps, outputs)
    for number, step in enumerate(steps):
        if not isinstance(step, NativeStep) or step.name not in SHIFTABLE:
            continue
        codes = step.arguments[SHIFTABLE[step.name]]
        if codes is None or (step.name == "attention" and step.arguments["out_type"] != cpu.TYPES[torch.int8]):
            continue
        readers = [steps[n] for n, _ in touching[id(codes.memory)] if n not in (number, len(steps))]
        seen = len(touching[id(codes.memory)]) - 1
        if len(readers) != seen or not all(_reads_rows(r, codes.memory) for r in readers) or codes.offset:
            continue
        sizes = {(r.arguments["m"], r.arguments["k"]) for r in readers}  # type: ignore[union-attr, call-overload]
        if len(sizes) != 1:
            continue
        rows, width = sizes.pop()
        stride = -(-width // ALIGN) * ALIGN
        stride += ALIGN * (stride % 4096 == 0)  # rows must not share one set of the first cache
        codes.memory.size = rows * stride
        step.arguments["out_stride" if step.name == "attention" else "codes_stride"] = stride
        step.arguments["shift"] = 1
        for reader in readers:
            reader.arguments.update(x_stride=stride, x_shifted=1)  # type: ignore[union-attr]


def _reads_rows(step: Step, memory: Memory) -> bool:
    """Whether a linear op takes all of `memory` as its int8 rows, and nothing else of it."""
    if not isinstance(step, NativeStep) or step.name not in LINEAR:
        return False
    if step.name == "int4_linear" and step.arguments["x_type"] != cpu.TYPES[torch.int8]:
        return False
    x = step.arguments["x"]
    return (
        x.memory is memory
        and x.offset == 0
        and step.arguments["m"] * step.arguments["k"] == memory.size
        and sum(m is memory for m, _ in step.touched()) == 1
    )


def _add_residuals_in_place(steps: list[Step], outputs: list[Any]) -> list[Step]:
    """y = linear(...); x + y -> the linear op adds x itself. In float32 that rounds the same way."""
    touching = _touching(steps, outputs)
    gone = set()
    for number, step in enumerate(steps):
        if not _is_plain_sum(step):
            continue
        assert isinstance(step, TorchStep)
        for y, x in (step.arguments[:2], step.arguments[1::-1]):
            users = touching[id(y.memory)]
            source = steps[users[0][0]]
            if (
                y.memory.kind != "temporary"
                or not y.whole()
                or y.memory is x.memory
                or len(users) != 2
                or not isinstance(source, NativeStep)
                or source.name not in LINEAR
            ):
                continue
            out, held = source.arguments["out"], touching.get(id(x.memory), [])
            if (
                out.memory is not y.memory
                or out.offset
                or source.arguments["residual"] is not None
                or source.arguments["out_type"] != cpu.TYPES[torch.float32]
                or any(written and users[0][0] <= n < number for n, written in held)
            ):
                continue
            source.arguments.update(
                residual=Pointer(x.memory, x.offset * 4),
                residual_type=cpu.TYPES[torch.float32],
                out=Pointer(step.results[0].memory, 0),
            )
            gone.add(number)
            break
    return [step for number, step in enumerate(steps) if number not in gone]


def _is_plain_sum(step: Step) -> bool:
    if not isinstance(step, TorchStep) or step.function != torch.ops.aten.add.Tensor or len(step.arguments) != 2:
        return False
    a, b = step.arguments
    if not (isinstance(a, View) and isinstance(b, View)):
        return False
    return (
        a.size == b.size
        and a.dtype == b.dtype == torch.float32
        and a.stride == b.stride == step.results[0].stride
        and step.results[0].whole()
        and b.memory.kind != "input"
        and a.memory.kind != "input"
    )


def _place(steps: list[Step], outputs: list[Any], stretches: list[tiling.Stretch]) -> int:
    """Give every temporary its place in the workspace, so that none overlaps another while both are alive. -> bytes"""
    memories: dict[int, Memory] = {}
    sharing: list[Memory] = []
    spans = {number: (s.begin, s.end - 1) for s in stretches for number in range(s.begin, s.end)}
    touched = [(memory, spans.get(n, (n, n))) for n, step in enumerate(steps) for memory, _ in step.touched()]
    touched += [(view.memory, (len(steps), len(steps))) for view in outputs if isinstance(view, View)]
    for memory, (begin, end) in touched:  # the tiles of a stretch are not all at the same step
        if memory.kind != "temporary" or memory.arena:
            continue
        if memory.shares is not None:
            sharing.append(memory)
        while memory.shares is not None:
            memory = memory.shares
        memories[id(memory)] = memory
        memory.first = begin if memory.first < 0 else min(memory.first, begin)
        memory.last = max(memory.last, end)
    size = _pack(list(memories.values()))
    for memory in sharing:
        root = memory
        while root.shares is not None:
            root = root.shares
        memory.place = root.place
    return -(-size // ALIGN) * ALIGN


def _place_arenas(steps: list[Step], stretches: list[tiling.Stretch]) -> int:
    """The same for what lives in the arena of a tile. -> bytes of an arena"""
    size = 0
    for segment in (segment for stretch in stretches for segment in stretch.segments):
        memories: dict[int, Memory] = {}
        for number in range(segment.begin, segment.end):
            for memory, _ in steps[number].touched():
                if memory.arena:
                    memories[id(memory)] = memory
                    memory.first = number if memory.first < 0 else memory.first
                    memory.last = number
        size = max(size, _pack(list(memories.values())))
    return -(-size // PAGE) * PAGE


def _pack(memories: list[Memory]) -> int:
    """Places for memories by their size and the steps between which they live. -> bytes"""
    placed: list[Memory] = []
    for memory in sorted(memories, key=lambda m: -(m.arena or m.size)):
        others = sorted((m for m in placed if m.first <= memory.last and memory.first <= m.last), key=lambda m: m.place)
        memory.place = 0
        for other in others:
            if memory.place + (memory.arena or memory.size) <= other.place:
                break
            memory.place = max(memory.place, -(-(other.place + (other.arena or other.size)) // ALIGN) * ALIGN)
        placed.append(memory)
    return max((m.place + (m.arena or m.size) for m in placed), default=0)
