"""JSON as RFC 8259 has it, and small: what Python's reader adds (NaN, endless integers, double keys) is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_text
from .files import reason

BYTES = 2_000_000  # the description of a ViT-bigG has a quarter of it
CONTAINERS = 100_000  # an empty list takes 64 bytes of memory for 3 in the file
DEPTH = 32
DIGITS = 40  # transformers writes 10^30 for "no limit"


def read_json(path: Path, refuse: type[InputError], limit: int = BYTES) -> Any:
    """The content of a JSON file. Raises `refuse`, in one sentence that names the file."""
    return parse_json(read_text(path, "JSON file", refuse, limit), str(path), refuse, max(limit, BYTES))


def parse_json(data: bytes | str, what: str, refuse: type[InputError], limit: int = BYTES) -> Any:
    """The value that JSON text describes; `what` names the text in errors. Raises `refuse` for text that is no JSON, or
    holds a key twice, more than 32 levels, numbers beyond 40 digits or float64, or NaN."""
    if len(data) > limit:
        raise refuse(f"{what!r} has {len(data)} bytes; more than {limit} are not read")
    brackets: tuple[Any, Any] = (b"[", b"{") if isinstance(data, bytes) else ("[", "{")
    if sum(data.count(bracket) for bracket in brackets) > (most := CONTAINERS * limit // BYTES):
        raise refuse(f"{what!r} holds more than {most} lists and objects; it is no description of ours")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(
            text, parse_int=_whole, parse_float=_real, parse_constant=_constant, object_pairs_hook=_without_doubles
        )
    except RecursionError:
        raise refuse(f"{what!r} is nested more than {DEPTH} deep") from None
    except ValueError as error:
        raise refuse(f"{what!r} is not valid JSON ({reason(error)})") from None
    if _depth(value) > DEPTH:
        raise refuse(f"{what!r} is nested more than {DEPTH} deep")
    return value


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> float:
    if len(digits) > 64 or not math.isfinite(value := float(digits)):
        raise ValueError("a number beyond float64")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {double[:60]!r} stands there twice")
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        if depth > DEPTH:
            break
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth
