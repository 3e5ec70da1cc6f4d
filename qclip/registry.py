"""Things by name: the package's own, and those that another package or a user's file adds.

A method, a score, a corruption, a measurement or a report section is one file. Ours are named in the registry's own
table; another package names its own in an entry point, a script calls `register`:

    [project.entry-points."qclip.scores"]
    mahalanobis = "my_package.scores:Mahalanobis"

Names are known without importing anything; an item is imported when it is asked for.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .errors import InputError, QclipError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Items of one kind by name, in the order in which they were named.

    kind: what one is called in messages ("score"). group: the entry points that add to it ("qclip.scores").
    own: name -> "module:attribute". attributes: what every item must have.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        own: Mapping[str, str],
        attributes: tuple[str, ...] = (),
        error: type[QclipError] = InputError,
    ) -> None:
        self.kind, self.group, self.attributes, self.error = kind, group, attributes, error
        self._own = dict(own)
        self._added: dict[str, T] = {}
        self._loaded: dict[str, T] = {}

    def register(self, item: T, name: str | None = None) -> T:
        """Add an item under `name`, by default its own `name`; returns it, so that it decorates a class or function.
        The same object may be registered again. Raises InputError where the name is taken or the item is unfit."""
        name = name or getattr(item, "name", None) or getattr(item, "__name__", None)
        if not isinstance(name, str):
            raise self.error(f"{item!r} has no name; give the {self.kind} a `name`")
        self._fit(item, name, "registered here")
        if self._added.get(name) is not item and name in self:
            raise self.error(f"a {self.kind} named {name!r} is there already; choose another name")
        self._added[name] = item
        return item

    def unregister(self, name: str) -> None:
        """Take back what `register` added. Raises InputError where it added nothing of that name."""
        if self._added.pop(name, None) is None:
            raise self.error(f"no {self.kind} named {name!r} was registered; {nearest(name, self._added)}")

    def names(self) -> list[str]:
        """Every name, without importing what it stands for."""
        return list(dict.fromkeys([*self._own, *self._installed, *self._added]))

    def get(self, name: str) -> T:
        """The item. Raises `error` where the name is unknown, or its package cannot be imported or used."""
        if name in self._added:
            return self._added[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def forget(self) -> None:
        """Look again which packages are installed, at the next question."""
        self.__dict__.pop("_installed", None)
        self._loaded.clear()

    def made(self, name: str) -> T:
        """The item, or an instance of it where it is a class."""
        item = self.get(name)
        return item() if isinstance(item, type) else item

    def items(self) -> list[tuple[str, T]]:
        return [(name, self.get(name)) for name in self.names()]

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._installed or name in self._added

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    @functools.cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        """Entry points of other packages by name. Raises `error` where two give one name: neither may win unseen."""
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            other = found.get(point.name)
            if point.name in self._own or (other is not None and other.value != point.value):
                raise self.error(
                    f"{_package(point)} adds a {self.kind} named {point.name!r}, which "
                    f"{'qclip' if other is None else _package(other)} has already; uninstall one of them"
                )
            found[point.name] = point
        return found

    def _load(self, name: str) -> T:
        if name in self._own:
            module, _, attribute = self._own[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if name not in self._installed:
            raise self.error(f"unknown {self.kind} {name!r}; {nearest(name, self.names())}")
        point = self._installed[name]
        try:
            item = point.load()
        except Exception as why:  # whatever another package does while it is imported
            raise self.error(
                f"the {self.kind} {name!r} of {_package(point)} ({point.value}) cannot be imported: "
                f"{type(why).__name__}: {why}; update or uninstall that package"
            ) from why
        self._fit(item, name, f"of {_package(point)}")
        return item

    def _fit(self, item: Any, name: str, whence: str) -> None:
        lacking = [attribute for attribute in self.attributes if not hasattr(item, attribute)]
        if lacking:
            raise self.error(f"the {self.kind} {name!r} {whence} has no {' and no '.join(map(repr, lacking))}")
        if getattr(item, "name", name) != name:
            raise self.error(
                f"the {self.kind} {whence} calls itself {item.name!r} and is named {name!r}; use one name for both"
            )


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module
