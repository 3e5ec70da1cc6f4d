"""What a recording consists of: steps, the memory that they touch, and tensors over that memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class Memory:
    """A storage that was seen. `temporary` ones get a place in the workspace."""

    kind: str  # "constant", "input", "temporary"
    size: int
    number: int = 0  # of the input
    alive: Any = None  # constants and inputs are kept
    made: Made | None = None  # how a constant came to be, where a call of torch made it while recording
    own: bool = False  # a constant that no other program of the family holds (family.py)
    first: int = -1  # steps between which a temporary holds something
    last: int = -1
    place: int = 0  # bytes from the start of the workspace, or of the arena
    arena: int = 0  # bytes in the arena of a tile, for one that lives there (tiling.py)
    shares: Memory | None = None  # the one whose place it takes


@dataclasses.dataclass
class Made:
    """A call of torch on constants only, and which of its results a memory is."""

    function: Any  # an OpOverload
    arguments: list[Any]  # flat; Views stand for tensors
    spec: Any
    index: int


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

    def over(self, storage: Any, start: int = 0) -> Tensor:
        """The tensor, where its memory lies `start` bytes from the start of `storage`."""
        if start % self.dtype.itemsize:
            raise AssertionError("the workspace is misaligned")
        with torch.inference_mode(False):
            tensor = torch.empty(0, dtype=self.dtype)
            return tensor.set_(storage, start // self.dtype.itemsize + self.offset, self.size, self.stride)

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
        return [(p.memory, self.kinds[name] == "w") for name, p in self.arguments.items() if type(p) is Pointer]


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


def touching(steps: list[Step], outputs: list[Any]) -> dict[int, list[tuple[int, bool]]]:
    """Memory -> the steps that touch it, in order, and whether they write. An output counts as a step behind all."""
    found: dict[int, list[tuple[int, bool]]] = {}
    for number, step in enumerate(steps):
        for memory, written in step.touched():
            found.setdefault(id(memory), []).append((number, written))
    for view in outputs:
        if isinstance(view, View):
            found.setdefault(id(view.memory), []).append((len(steps), False))
    return found
