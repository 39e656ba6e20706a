"""Settings of architecture techniques beyond record 26, each off by default. What they build is in core/model/options.

Imports no torch, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

from typing import Any, TypeVar

from speedrun_mup.flags import LARGEST
from speedrun_mup.settings import at_least, at_most, setting

T = TypeVar("T", bound=type)
COUNT = (at_most(LARGEST), at_least(0))

TECHNIQUE_SETTINGS: dict[str, tuple[Any, Any]] = {
    "attention_gate": (
        int,
        setting(
            "techniques",
            "channels of its input that gate each attention head (record 28; 12 since record 30); 0: no gates",
            0,
            affects="result",
            valid=COUNT,
        ),
    ),
}


def with_technique_settings(config: T) -> T:
    """Give a class of settings, which is to be a dataclass, those of TECHNIQUE_SETTINGS."""
    for name, (kind, declared) in TECHNIQUE_SETTINGS.items():
        config.__annotations__[name] = kind
        setattr(config, name, declared)
    return config
