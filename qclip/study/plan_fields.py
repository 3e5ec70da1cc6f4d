"""The fields of a plan's file, each with its type; what does not fit is refused with its line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qclip.data import sources
from qclip.errors import InputError, nearest

from .plan import Plan, fits


class Fields:
    """Of the plan in `blank`, which knows the file's text."""

    def __init__(self, blank: Plan) -> None:
        self.blank = blank

    def known(self, table: Mapping[str, Any], known: Iterable[str], name: str, at: int = 0) -> None:
        for key in table:
            if key not in known:
                where = f" in [{name}]" if name else ""
                raise self.blank.refusal(f"unknown field {key!r}{where}; {nearest(key, known)}", name, key, at=at)

    def table(self, value: Any, name: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.blank.refusal(f"{name!r} is a table of fields, not {value!r}", "", name)
        return value

    def listed(self, table: Mapping[str, Any], name: str, key: str) -> list[Any]:
        """What a field holds; one value is a list of one."""
        value = table.get(key, [])
        return value if isinstance(value, list) else [value]

    def texts(self, table: Mapping[str, Any], name: str, key: str, at: int = 0) -> tuple[str, ...]:
        found = self.listed(table, name, key)
        for value in found:
            if not isinstance(value, str) or not value:
                raise self.blank.refusal(f"`{key}` takes texts, not {value!r}", name, key, value, at)
            if found.count(value) > 1:
                raise self.blank.refusal(f"{value!r} is there twice; once is enough", name, key, value, at)
        return tuple(found)

    def data(self, table: Mapping[str, Any], name: str, key: str, at: int = 0) -> tuple[str, ...]:
        """Data names."""
        found = self.texts(table, name, key, at)
        for value in found:
            self.taken(functools.partial(sources.parse, value), name, key, value, at)
        return found

    def one(self, table: Mapping[str, Any], name: str, key: str, at: int = 0, named: bool = True) -> str | None:
        found = self.data(table, name, key, at) if named else self.texts(table, name, key, at)
        if len(found) > 1:
            raise self.blank.refusal(f"`{key}` takes one, not {len(found)}", name, key, at=at)
        return found[0] if found else None

    def numbers(
        self, table: Mapping[str, Any], name: str, key: str, low: int, high: int, at: int = 0
    ) -> tuple[int, ...]:
        found = self.listed(table, name, key)
        for value in found:
            if type(value) is not int or not low <= value <= high:
                raise self.blank.refusal(
                    f"`{key}` takes whole numbers from {low} to {high}, not {value!r}", name, key, value, at
                )
            if found.count(value) > 1:
                raise self.blank.refusal(f"`{key}` holds {value} twice; once is enough", name, key, value, at)
        return tuple(found)

    def number(self, table: Mapping[str, Any], name: str, key: str, low: int, high: int) -> int | None:
        found = self.numbers(table, name, key, low, high)
        if len(found) > 1:
            raise self.blank.refusal(f"`{key}` takes one, not {len(found)}", name, key)
        return found[0] if found else None

    def filled(self, table: Mapping[str, Any], name: str, key: str, at: int = 0) -> None:
        """Refuses a list that is there and empty: nothing would be left of the product."""
        if key in table and not self.listed(table, name, key):
            raise self.blank.refusal(f"`{key}` is empty, and so is the product", name, key, at=at)

    def patterns(self, given: Iterable[str], models: Iterable[str], name: str, at: int = 0) -> None:
        """Refuses those of a field `models` that no model of the plan fits."""
        for pattern in given:
            if not any(fits((pattern,), model) for model in models):
                why = f"no model of the plan is {pattern!r}; {nearest(pattern, models)}"
                raise self.blank.refusal(why, name, "models", pattern, at)

    def flag(self, table: Mapping[str, Any], name: str, key: str) -> bool | None:
        value = table.get(key)
        if value is not None and type(value) is not bool:
            raise self.blank.refusal(f"`{key}` takes true or false, not {value!r}", name, key)
        return value

    def taken(self, make: Callable[[], Any], table: str, key: str, value: object = None, at: int = 0) -> Any:
        """What `make` gives; what it refuses is refused with the line."""
        try:
            return make()
        except InputError as why:
            raise self.blank.refusal(why, table, key, value, at) from None
