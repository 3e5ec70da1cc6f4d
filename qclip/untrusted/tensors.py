"""What a safetensors file says that it holds, read and checked without the library and without the tensors.

The format: 8 bytes, the header's length; the header, JSON {name: {dtype, shape, data_offsets}}; the tensors, one behind
the other without a gap (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from ..errors import InputError
from .files import open_regular
from .strict_json import BYTES, parse_json

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclasses.dataclass(frozen=True)
class TensorFacts:
    """One tensor: `dtype` as safetensors names it, `shape`, and its bytes `start` to `end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


TensorFile = dict[str, TensorFacts]


def read_header(path: Path, refuse: type[InputError]) -> TensorFile:
    """The tensors of a file by name, in the order of their bytes. Raises `refuse` where the header is too long, no
    JSON, of an unknown dtype, or contradicts itself or the file's size."""

    def no(why: str) -> InputError:
        return refuse(f"{str(path)!r} is not a readable safetensors file ({why})")

    with open_regular(path, refuse) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise no(f"its header would end behind its {size} bytes; it is truncated or foreign")
        if length > BYTES:
            raise no(f"a header of {length} bytes; more than {BYTES} are not read")
        data = file.read(length)
    content = parse_json(data, f"{path} (header)", refuse)
    if not isinstance(content, dict):
        raise no("its header is no object")
    content.pop("__metadata__", None)
    found = [(name, _facts(name, facts, 8 + length, no)) for name, facts in content.items()]
    found.sort(key=lambda item: (item[1].start, item[1].end))
    at = 8 + length
    for name, facts in found:
        if facts.start != at:
            raise no(f"{name[:80]!r} starts at byte {facts.start} instead of {at}")
        at = facts.end
    if at != size:
        raise no(f"its tensors end at byte {at} of {size}")
    return dict(found)


def _facts(name: str, facts: object, base: int, no) -> TensorFacts:  # noqa: ANN001
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise no(f"{name[:80]!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise no(f"{name[:80]!r} is {str(dtype)[:20]}, which no checkpoint here holds")
    if not _whole_numbers(shape) or len(shape) > 8:
        raise no(f"{name[:80]!r} has no shape")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise no(f"{name[:80]!r} has no offsets")
    start, end = offsets
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise no(f"{name[:80]!r} has {end - start} bytes, which are not its shape {tuple(shape)} of {dtype}")
    return TensorFacts(dtype, tuple(shape), base + start, base + end)


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)
