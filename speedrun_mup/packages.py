"""Packages that not everybody has: imported when needed, and one line where they are missing or something has their name."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from speedrun_mup.core.errors import ConfigError, in_a_line
from speedrun_mup.files import printable


def import_package(name: str) -> ModuleType:
    """Import a package that may not be installed.

    A folder of that name in the working folder, such as the one that a tracker writes to, is not the package.

    Raises:
        ImportError: if it is not installed.
    """
    module = importlib.import_module(name)
    if hasattr(module, "__path__") and getattr(module, "__file__", None) is None:
        sys.modules.pop(name, None)
        raise ImportError(f"{name} is a folder without a package in it", name=name)
    return module


def import_extra(name: str, needed: str, need: str, extra: str) -> ModuleType:
    """Import a package that comes with one of this project's extras.

    Args:
        name: of the module, such as "pyarrow.parquet".
        needed: an attribute that the right module has, and a file or folder of the user's that has its name has not.
        need: who needs it, the start of the message.
        extra: of `pip install 'speedrun-mup[extra]'`.

    Raises:
        ConfigError: it is missing, broken, or something else has its name.
    """
    package = name.partition(".")[0]
    install = f"pip install 'speedrun-mup[{extra}]'"
    try:
        module = import_package(name)
        if hasattr(module, needed):
            return module
    except (
        Exception
    ) as fault:  # a package may raise anything while it is imported, if another one of its own is missing
        if not (place := _place(package)):
            raise ConfigError(f"{need} needs {package}, which is not installed; {install}") from None
        if not isinstance(fault, ImportError) or fault.name not in (package, name):
            why = fault.msg if isinstance(fault, ImportError) else in_a_line(fault)
            why = f"{printable(place)} cannot be imported ({printable(why)})"
            raise ConfigError(f"{need} needs {package}, but {why}; {install}") from None
    raise ConfigError(
        f"{need} needs the package {package}, but {printable(_place(package))} has its name and is not it; rename that, "
        f"or start in another folder, and {install}"
    )


def _place(package: str) -> str | None:
    """Where the module that Python finds under this name lies; None if there is none."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # ValueError: it is in sys.modules, without a place
        return None
    if spec is None:
        return None
    return next(iter(spec.submodule_search_locations or ()), spec.origin)
