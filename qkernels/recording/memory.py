"""Assigns memory to the temporaries of a recording: places in one workspace, and in the arena of a tile."""

from __future__ import annotations

from typing import Any

from .steps import Memory, Step, View
from .tiling import FusedRegion

ALIGN, PAGE = 64, 4096


def place(steps: list[Step], outputs: list[Any], regions: list[FusedRegion]) -> int:
    """Give every temporary its place in the workspace, so that none overlaps another while both are alive. -> bytes"""
    memories: dict[int, Memory] = {}
    sharing: list[Memory] = []
    spans = {number: (s.begin, s.end - 1) for s in regions for number in range(s.begin, s.end)}
    touched = [(memory, spans.get(n, (n, n))) for n, step in enumerate(steps) for memory, _ in step.touched()]
    touched += [(view.memory, (len(steps), len(steps))) for view in outputs if isinstance(view, View)]
    for memory, (begin, end) in touched:  # the tiles of a region are not all at the same step
        if memory.kind != "temporary" or memory.arena:
            continue
        if memory.shares is not None:
            sharing.append(memory)
        while memory.shares is not None:
            memory = memory.shares
        memories[id(memory)] = memory
        memory.first = begin if memory.first < 0 else min(memory.first, begin)
        memory.last = max(memory.last, end)
    size = pack(list(memories.values()))
    for memory in sharing:
        root = memory
        while root.shares is not None:
            root = root.shares
        memory.place = root.place
    return -(-size // ALIGN) * ALIGN


def place_arenas(steps: list[Step], regions: list[FusedRegion]) -> int:
    """The same for what lives in the arena of a tile. -> bytes of an arena"""
    size = 0
    for segment in (segment for region in regions for segment in region.segments):
        memories: dict[int, Memory] = {}
        for number in range(segment.begin, segment.end):
            for memory, _ in steps[number].touched():
                if memory.arena:
                    memories[id(memory)] = memory
                    memory.first = number if memory.first < 0 else memory.first
                    memory.last = number
        size = max(size, pack(list(memories.values())))
    return -(-size // PAGE) * PAGE


def pack(memories: list[Memory]) -> int:
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
