"""JSON objects as dataclasses: unknown fields and wrong types are refused in a sentence that names the field."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from .errors import QclipError, nearest
from .untrusted.schema import shown

T = TypeVar("T")
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    type(None): "null",
    dict: "an object",
    list: "a list",
}


def from_dict(kind: type[T], content: object, what: str, error: type[QclipError]) -> T:
    """An instance of the dataclass `kind` from what JSON gave. Its fields are bool, int, float, str, None, `Literal`s,
    tuples of one of them (JSON: lists), and unions of those; whole numbers serve as float. `what` names the object in
    messages ("" where the caller does). Raises `error`, also where `kind` refuses the values with a ValueError."""
    where = f"{what}: " if what else ""
    if not isinstance(content, Mapping):
        raise error(f"{where}an object of fields is wanted, not {shown(content)}")
    hints = fields(kind)  # type: ignore[arg-type]
    given = {}
    for name, value in content.items():
        if name not in hints:
            raise error(f"{where}unknown field {shown(name)}; {nearest(str(name), hints)}")
        if not fits(value, hints[name]):
            raise error(f"{where}{name!r} has the wrong type; it takes {words(hints[name])}, not {shown(value)}")
        given[name] = _as(value, hints[name])
    lacking = [f.name for f in dataclasses.fields(kind) if f.name not in given and _required(f)]  # type: ignore[arg-type]
    if lacking:
        raise error(f"{where}{lacking[0]!r} is missing")
    try:
        return kind(**given)
    except ValueError as why:
        raise error(f"{where}{why}") from why


@functools.cache
def fields(kind: type) -> dict[str, Any]:
    """Field name -> type of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def fits(value: object, hint: Any) -> bool:
    """Whether a JSON value is of this type. `True` is no number, and NaN and Inf are none either."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(fits(each, inner[0]) for each in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    return value is None if hint in (None, type(None)) else type(value) is hint


def words(hint: Any) -> str:
    """ "a whole number or null": what a field of this type takes."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(each) for each in inner)
    if origin is tuple:
        return f"a list, each item {words(inner[0])}"
    return _WORDS.get(hint, str(hint))


def _as(value: Any, hint: Any) -> Any:
    """The value as the field holds it: lists are tuples, whole numbers floats where only floats are meant."""
    if isinstance(value, list):
        return tuple(value)
    return float(value) if hint is float else value
