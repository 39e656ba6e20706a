"""Every command as far as its flags: what its parser is just before it parses."""

import importlib

import pytest

from speedrun_mup.cli import COMMANDS
from speedrun_mup.core.errors import ConfigError


def parsers(monkeypatch):
    """The parser of each command, and of each part of `data`, with all its flags."""
    found = []

    def remember(parser, argv):
        found.append(parser)
        raise ConfigError("seen")

    for name in COMMANDS:
        module = importlib.import_module(f"speedrun_mup.commands.{name.replace('-', '_')}")
        monkeypatch.setattr(module, "parse", remember)
        parts = {"data": ("run_text", "run_fineweb", "run_inspect"), "coord-check": ("_check_model",)}.get(name, ())
        for command in (module.run, *(getattr(module, part) for part in parts)):
            with pytest.raises(ConfigError):
                command([])
    return found
