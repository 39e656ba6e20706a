"""Packages that can be called: `from speedrun_mup import sweep` is both the package of sweeps and the function that makes one."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module that passes a call on to a function of the same name in `speedrun_mup.functions`, imported at the first call."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """See the function."""
        functions = importlib.import_module("speedrun_mup.functions")
        return getattr(functions, self.__name__.rpartition(".")[2])(*arguments, **named)


def make_callable(module: str) -> None:
    """Let a module be called as the function of its name."""
    sys.modules[module].__class__ = _Callable
