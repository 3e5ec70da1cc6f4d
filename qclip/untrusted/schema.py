"""What a description may carry, as data: checks that are put together like the JSON that they allow.

A check is called with a value and the place where it stands, and raises `Refused` with one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import InputError

Check = Callable[[Any, str], None]


class Refused(ValueError):
    """A value that is not allowed; says which and where."""


def validate(check: Check, value: Any, where: str, refuse: type[InputError]) -> None:
    """Raises `refuse` unless `value` is what `check` allows; `where` begins the sentence."""
    try:
        check(value, where)
    except Refused as error:
        raise refuse(str(error)) from None


def shown(value: Any) -> str:
    """A value from a file, short and without control characters."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def whole(low: int, high: int) -> Check:
    """An integer from `low` to `high`."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise Refused(f"{where} is {shown(value)}; it must be a whole number from {low} to {high}")

    return check


def real(low: float, high: float) -> Check:
    """A number from `low` to `high`, finite."""

    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high:
            raise Refused(f"{where} is {shown(value)}; it must be a number from {low} to {high}")

    return check


def flag(value: Any, where: str) -> None:
    """true or false."""
    if type(value) is not bool:
        raise Refused(f"{where} is {shown(value)}; it must be true or false")


def null(value: Any, where: str) -> None:
    """null, and nothing else: a setting that exists and is not used here."""
    if value is not None:
        raise Refused(f"{where} is {shown(value)}; that is not allowed in a file")


def one_of(*allowed: Any) -> Check:
    """One of these values, of the same type."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise Refused(f"{where} is {shown(value)}; it must be one of {', '.join(map(repr, allowed))}")

    return check


def text(longest: int, pattern: str | None = None) -> Check:
    """A string of at most `longest` characters that matches `pattern` as a whole."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > longest:
            raise Refused(f"{where} is {shown(value)}; it must be a text of at most {longest} characters")
        if pattern is not None and re.fullmatch(pattern, value) is None:
            raise Refused(f"{where} is {shown(value)}, which is not of the form {pattern}")

    return check


def listing(item: Check, least: int, most: int) -> Check:
    """A list of `least` to `most` items."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            count = str(least) if least == most else f"{least} to {most}"
            raise Refused(f"{where} is {shown(value)}; it must be a list of {count}")
        for i, inner in enumerate(value):
            item(inner, f"{where}[{i}]")

    return check


def either(*checks: Check) -> Check:
    """What any of these allows; the last one's sentence is the one that is said."""

    def check(value: Any, where: str) -> None:
        for candidate in checks[:-1]:
            try:
                return candidate(value, where)
            except Refused:
                continue
        return checks[-1](value, where)

    return check


def optional(check: Check) -> Check:
    """What `check` allows, or null."""
    return lambda value, where: None if value is None else check(value, where)


def record(fields: Mapping[str, Check], needed: Collection[str] = ()) -> Check:
    """An object with these keys only; `needed` must be there."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise Refused(f"{where} is {shown(value)}; it must be an object")
        for key in value:
            if key not in fields:
                raise Refused(f"{where} holds {shown(key)}, which is not allowed in a file")
        for key in needed:
            if key not in value:
                raise Refused(f"{where} lacks {key!r}")
        for key, inner in value.items():
            fields[key](inner, f"{where}.{key}")

    return check


def mapping(keys: Check, values: Check, most: int) -> Check:
    """An object of at most `most` entries."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise Refused(f"{where} is {shown(value)}; it must be an object of at most {most}")
        for key, inner in value.items():
            keys(key, f"a name in {where}")
            values(inner, f"{where}[{shown(key)}]")

    return check


def anything(value: Any, where: str) -> None:
    """Whatever JSON holds: it is kept and shown, and nothing is built from it."""
