"""Things that are chosen by name, and packages whose names are imported when they are first asked for. Needs no torch."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from speedrun_mup.core.errors import ConfigError

T = TypeVar("T")


def resolve(place: str) -> Any:
    """What is at "module:attribute"; imports the module."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Registry(Mapping[str, T], Generic[T]):
    """Things by name. Of those that come with the package only the place is known until one is asked for.

    So `--help` can list the names without importing torch, and an entry is one line.
    """

    def __init__(self, what: str, places: Mapping[str, str]):
        """`what` is in it, in one word; places: name -> "module:attribute"."""
        self.what = what
        self._places = dict(places)
        self._things: dict[str, T] = {}

    def register(self, name: str, thing: T) -> None:
        """Add a thing of your own. Raises ConfigError if the name is taken or cannot be typed, or the thing is none."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise ConfigError(f"{self.what} {name!r} needs a name of letters, digits, _, - and dots")
        if not callable(thing):
            raise ConfigError(f"{self.what} {name!r} is {thing!r:.60}; register a class or a function")
        if name in self and self._things.get(name) is not thing:
            raise ConfigError(f"{self.what} {name!r} is registered already; choose another name")
        self._things[name] = thing

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise ConfigError(f"{self.what} {name!r} is unknown; choose {', '.join(self)}")
        if name not in self._things:
            self._things[name] = resolve(self._places[name])
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._things

    def __iter__(self) -> Iterator[str]:
        yield from self._places
        yield from (name for name in self._things if name not in self._places)

    def __len__(self) -> int:
        return len(self._places.keys() | self._things.keys())


def names_of(library: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that takes its names from the module `library` when they are asked for."""

    def __getattr__(name: str) -> Any:
        return getattr(importlib.import_module(library), name)

    def __dir__() -> list[str]:
        return list(importlib.import_module(library).__all__)

    return __getattr__, __dir__
