"""Programs played depth first: a task takes some rows through several steps instead of a step through all rows.

Between two steps of a tower lies a matrix of all tokens, far larger than the second cache. Most steps treat every row
alone, and attention every image, so such steps form a *fused region* that may go tile by tile: what passes between its
steps then stays in a small arena of the thread that works on the tile. A region is cut into *segments* where only one
matrix (the residual stream) crosses; a tile of a segment starts when the tiles of the segment before that hold its rows
are done. There is no barrier, and every row meets the same arithmetic as before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from qkernels.contract import GROUP

# Rows of a tile, but for images that have more: their codes and hidden values share the second cache. The same where
# that is smaller: fewer rows read the weights more often, which costs more than what overflows (dev/tower_ladder).
ROWS = 96
SIZES = (4, 2, 2, 1)  # bytes by QkType of csrc/cpu/ops.h
SHIFT, COUNT, ARENA = 0, 1, 2  # what happens to a word of a step for a tile (struct Patch of csrc/cpu/program.h)

Arguments = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Items:
    """How a step's arguments belong to its items, rows or images: `count` names their number, `strides` the bytes from
    one item to the next of each pointer that moves with them."""

    count: str
    rows: Callable[[Arguments], int]  # of an item
    strides: Callable[[Arguments], dict[str, int]]


def _groups(n: int) -> int:
    return -(-n // GROUP)


def _linear(a: Arguments) -> dict[str, int]:
    scale = (0, 4, 4 * _groups(a["k"]))[a["x_scale_kind"]] if a["x_scale"] is not None else 0
    return {
        "x": a["x_stride"],
        "x_scale": scale,
        "residual": a["n"] * SIZES[a["residual_type"]],
        "out": a["n"] * SIZES[a["out_type"]],
        "group_scales": 4 * _groups(a["n"]),
    }


def _rows(a: Arguments) -> dict[str, int]:
    return {"x": a["k"] * SIZES[a["type"]], "codes": a["codes_stride"], "scales": 4}


def _patches(a: Arguments) -> dict[str, int]:
    rows = a["rows"] * a["columns"]
    return {"x": a["image_stride"] * SIZES[a["type"]], "codes": rows * a["codes_stride"], "scales": 4 * rows}


def _attention(a: Arguments) -> dict[str, int]:
    size = SIZES[a["type"]]
    return {
        "q": a["q_batch"] * size,
        "k": a["k_batch"] * size,
        "v": a["v_batch"] * size,
        "mask": a["mask_batch"] * (1 if a["mask_is_bool"] else 4),
        "out": a["queries"] * a["out_stride"],
        "scales": 4 * a["queries"],
    }


def _one(a: Arguments) -> int:
    return 1


OPS = {
    "int8_linear": Items("m", _one, _linear),
    "int4_linear": Items("m", _one, _linear),
    "quantize_per_token": Items("rows", _one, _rows),
    "layer_norm_quantize": Items("rows", _one, _rows),
    "quantize_patches": Items("batch", lambda a: a["rows"] * a["columns"], _patches),
    "attention": Items("batch", lambda a: a["queries"], _attention),
}


@dataclasses.dataclass
class Segment:
    begin: int  # steps
    end: int
    rows: int  # of an item: a whole number of items of every step
    bounds: list[int]  # of its tiles, in items


@dataclasses.dataclass
class FusedRegion:
    begin: int  # steps
    end: int
    segments: list[Segment]


def _moves(step: Any) -> Iterator[tuple[str, Any, int, bool]]:
    """(argument, pointer, bytes per item, whether it is written) of the pointers that move with a step's items."""
    for name, stride in OPS[step.name].strides(step.arguments).items():
        pointer = step.arguments.get(name)
        if pointer is not None and stride:
            yield name, pointer, stride, step.kinds[name] == "w"


class _Fit:
    """Which steps can join a fused region: all matrices that it writes are touched by whole rows, the same for all."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.strides: dict[int, tuple[int, bool]] = {}  # memory -> bytes per row (0: not by rows), whether written

    def add(self, step: Any) -> bool:
        items = OPS[step.name].rows(step.arguments)
        moving = {name for name, *_ in _moves(step)}
        found = dict(self.strides)
        for name, pointer in step.arguments.items():
            if step.kinds[name] in "rw" and pointer is not None and name not in moving:
                memory = pointer.memory
                if step.kinds[name] == "w" or found.get(id(memory), (0, False))[1]:
                    return False
                found[id(memory)] = 0, False
        for _, pointer, stride, written in _moves(step):
            memory, row = pointer.memory, stride // items
            before, was_written = found.get(id(memory), (row, False))
            written = written or was_written
            if written and (
                stride % items
                or row != before
                or pointer.offset >= row
                or row * self.rows > memory.size
                or memory.kind != "temporary"
            ):
                return False
            found[id(memory)] = row if row == before else 0, written
        self.strides = found
        return True


def regions(steps: list[Any], native: Callable[[Any], bool], touching: dict, threads: int) -> list[FusedRegion]:
    """The regions of `steps` that are worth it: at least a tile for every thread, and two."""
    found: list[FusedRegion] = []
    begin, fit = 0, None
    for number, step in enumerate([*steps, None]):
        rows = _rows_of(step, native)
        if fit is not None and rows == fit.rows and fit.add(step):
            continue
        if fit is not None and number - begin > 1:
            found.append(_cut(steps, begin, number, fit.rows, touching, threads))
        begin, fit = number, None
        if rows:
            fit = _Fit(rows)
            if not fit.add(step):
                fit = None
    return [s for s in found if all(len(g.bounds) > max(2, threads) for g in s.segments)]


def _rows_of(step: Any, native: Callable[[Any], bool]) -> int:
    """Rows that a step treats, 0 for one that cannot be tiled."""
    if step is None or not native(step) or step.name not in OPS:
        return 0
    if step.name == "attention" and step.arguments["queries"] != step.arguments["keys"]:
        return 0
    items = OPS[step.name]
    return int(step.arguments[items.count] * items.rows(step.arguments))


def _cut(steps: list[Any], begin: int, end: int, rows: int, touching: dict, threads: int) -> FusedRegion:
    """Segments: cut wherever one temporary crosses."""
    crossing = [0] * (end - begin)  # temporaries alive between step begin + i and the next
    # A mask that was there before the region lets tiles wait for nothing.
    seen = _masks(steps[begin:end])
    for step in steps[begin:end]:
        for memory, _ in step.touched():
            if memory.kind == "temporary" and id(memory) not in seen:
                seen.add(id(memory))
                numbers = [n for n, _ in touching[id(memory)]]
                for number in range(max(min(numbers), begin), min(max(numbers), end)):
                    crossing[number - begin] += 1
    segments, first = [], begin
    for number in range(begin, end):
        if number + 1 == end or crossing[number - begin] == 1:
            items = math.lcm(*(OPS[s.name].rows(s.arguments) for s in steps[first : number + 1]))
            segments.append(Segment(first, number + 1, items, _bounds(rows // items, items)))
            first = number + 1
    return FusedRegion(begin, end, segments)


def _masks(steps: list[Any]) -> set[int]:
    """The memories that these steps read as masks of attention, and touch as nothing else."""
    as_mask: set[int] = set()
    otherwise: set[int] = set()
    for step in steps:
        for name, value in step.arguments.items():
            if step.kinds[name] in "rw" and value is not None:
                (as_mask if name == "mask" else otherwise).add(id(value.memory))
    return as_mask - otherwise


def _bounds(items: int, rows: int) -> list[int]:
    """Tiles of nearly equal size, of at most ROWS rows where an item has fewer."""
    tiles = -(-items // max(1, ROWS // rows))
    return [items * i // tiles for i in range(tiles + 1)]


def settle(region: FusedRegion, steps: list[Any], touching: dict) -> None:
    """Say of each temporary of a fused region where it lives: in the arena of a tile if one segment alone touches it,
    else in the workspace, where the result of a linear op takes the place of a residual that nobody needs after it."""
    for segment in region.segments:
        most = max(end - begin for begin, end in zip(segment.bounds, segment.bounds[1:], strict=False)) * segment.rows
        for number in range(segment.begin, segment.end):
            step = steps[number]
            for name, pointer, stride, _ in _moves(step):
                memory, users = pointer.memory, [n for n, _ in touching[id(pointer.memory)]]
                if memory.kind != "temporary" or memory.arena:
                    continue
                if segment.begin <= users[0] and users[-1] < segment.end:
                    memory.arena = (most + 1) * (stride // OPS[step.name].rows(step.arguments))
                elif name == "out" and users[0] == number:
                    memory.shares = _dying_residual(step, memory, touching, number)


def _dying_residual(step: Any, memory: Any, touching: dict, number: int) -> Any:
    """The memory of a residual that ends with this linear op and whose values lie where those of the result will."""
    residual = step.arguments.get("residual")
    if residual is None or residual.memory.kind != "temporary" or residual.offset or step.arguments["out"].offset:
        return None
    if residual.memory.arena:  # the tile's own, which another tile takes
        return None
    same = step.arguments["residual_type"] == step.arguments["out_type"] and residual.memory.size == memory.size
    return residual.memory if same and touching[id(residual.memory)][-1][0] == number else None


def changes(segment: Segment, steps: list[Any]) -> Iterator[tuple[int, str, int, int]]:
    """(step, argument, kind of change, stride): what a tile's first item and number of items make of the arguments."""
    for number in range(segment.begin, segment.end):
        step = steps[number]
        items = OPS[step.name]
        share = segment.rows // items.rows(step.arguments)  # items of the step in an item of the segment
        yield number, items.count, COUNT, share
        for name, pointer, stride, _ in _moves(step):
            yield (number, name, ARENA, 0) if pointer.memory.arena else (number, name, SHIFT, stride * share)
