"""Programs on a GPU: a function captured in a CUDA graph, with the interface of a tape's `Program`.

A replay copies the inputs into buffers of the graph, launches every kernel of the function in one call, and copies
the results out. The graph has a memory pool of its own, which goes back to torch when the program is dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .limits import UnrecordableError, depends_on_values, same_numbers

COPIES = ("aten::_to_copy", "aten::copy_")


class _Watcher(TorchDispatchMode):
    """Refuses what a graph cannot hold, or would do in another way than the function, before it is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()  # addresses of storages that came to be below
        self.read: dict[int, Tensor] = {}  # what was there before: a graph knows addresses, it keeps nothing alive

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        schema, name = function._schema, function._schema.name
        given = dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
        changed = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if not changed and function._can_decompose():
            with self:
                return function.decompose(*args, **kwargs)
        random = torch.Tag.nondeterministic_seeded in function.tags
        if random and ("dropout_p" not in [a.name for a in schema.arguments] or given.get("dropout_p")):
            raise UnrecordableError(f"it draws random numbers ({name})")
        tensors = _tensors((args, kwargs))
        if depends_on_values(function, tensors):
            raise UnrecordableError(f"it reads numbers out of a tensor ({name})")
        foreign = {_address(t): t for t in tensors if t.numel() and _address(t) not in self.made}
        if any(_address(t) in foreign for t in _tensors([given.get(argument) for argument in changed])):
            raise UnrecordableError(f"it changes a tensor that is not its own ({name})")
        result = function(*args, **kwargs)
        if name in COPIES and len({t.device for t in (*tensors, *_tensors(result))}) > 1:
            raise UnrecordableError(f"it copies between devices ({name})")
        self.read |= foreign
        self.made |= {_address(t) for t in _tensors(result)} - self.read.keys()
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [value for value in tree_flatten(tree)[0] if isinstance(value, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class GraphProgram:
    """A captured function: `program(*inputs)` -> what the function returned, in new tensors, on the current stream. Not
    for two threads at once; calls on different streams wait for each other, since they share the graph's memory.

    `constants`: what the function reads besides its inputs.
    """

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...], constants: list[Tensor]) -> None:
        self._device, self._held = inputs[0].device, [tensor.untyped_storage() for tensor in constants]
        with torch.cuda.device(self._device):
            with torch.inference_mode(False), torch.no_grad():  # to be written in any mode
                self._inputs = [tensor.clone() for tensor in inputs]
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved()
            self._graph = torch.cuda.CUDAGraph()
            self._stream = torch.cuda.Stream()  # where the graph's memory was last used
            # Other threads may go on allocating meanwhile.
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._results, self._spec = tree_flatten(function(*self._inputs))
            self.workspace_bytes = torch.cuda.memory_reserved() - held
            self._done = torch.cuda.Event()
            self._done.record(self._stream)
        weakref.finalize(self, _drop, self._graph, self._done).atexit = False

    def __call__(self, *inputs: Tensor) -> Any:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if stream != self._stream:
                stream.wait_event(self._done)
                self._stream = stream
            for buffer, tensor in zip(self._inputs, inputs, strict=True):
                buffer.copy_(tensor)
            self._graph.replay()
            found = [r.clone() if isinstance(r, Tensor) else r for r in self._results]
            self._done.record(stream)
        return tree_unflatten(found, self._spec)

    def describe(self) -> dict[str, int]:
        """How many graphs it launches, and the bytes of its memory pool."""
        return {"graphs": 1, "workspace_bytes": self.workspace_bytes}


def _drop(graph: Any, done: Any) -> None:
    """A graph that still runs must not lose its memory."""
    done.synchronize()
    graph.reset()


def capture(function: Callable[..., Any], *inputs: Tensor) -> GraphProgram:
    """Run `function(*inputs)` once on a stream of its own, so that all it compiles and allocates is there, capture it,
    and compare a replay with that run. Grad mode must be off.

    Inputs are plain tensors on one GPU. Raises UnrecordableError where the function does what a graph cannot hold
    (values read on the host, random numbers, copies between devices, changes of tensors that it did not make), where
    memory runs out, and where the replay gives other numbers; the graph's memory is then free again.
    """
    if torch.is_grad_enabled():
        raise UnrecordableError("gradients are on")
    watcher = _Watcher()
    with torch.cuda.device(inputs[0].device):
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream), watcher:
            wanted = tree_flatten(function(*inputs))[0]
        current.wait_stream(stream)
    constants = [tensor for address, tensor in watcher.read.items() if address not in map(_address, inputs)]
    try:
        program = GraphProgram(function, inputs, constants)
        found = tree_flatten(program(*inputs))[0]
        same = all(same_numbers(w, f) for w, f in zip(wanted, found, strict=True) if isinstance(w, Tensor))
        reason = None if same else "a replay gave other numbers"
    except RuntimeError as error:  # the function itself ran: memory is short, or it does what only CUDA knows to be
        reason = str(error).partition("\n")[0]  # forbidden while a stream is captured
        program = None
    if program is not None and reason is None:
        return program
    del program
    torch.cuda.empty_cache()
    raise UnrecordableError(f"it cannot be captured: {reason}")
