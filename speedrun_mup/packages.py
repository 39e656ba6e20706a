"""Packages that not everybody has."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


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
