"""config.json: the settings of a run as strict JSON, written and read."""

from __future__ import annotations

import json
from pathlib import Path

from speedrun_mup.config import TrainConfig, build, check_known, check_whole, settings, types
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.editions import present_names


def to_json(cfg: TrainConfig) -> str:
    """The settings as strict JSON."""
    return json.dumps({name: getattr(cfg, name) for name in settings()}, indent=1, allow_nan=False)


def from_json(text: str, source: Path) -> TrainConfig:
    """Read back `to_json`. ConfigError naming `source` for anything that is not a TrainConfig."""
    try:
        values = present_names(json.loads(text))
        check_known(values)
        check_whole(values)
        for name, value in values.items():
            kind, optional = types()[name]
            fits = type(value) is kind or (kind is float and type(value) is int) or (value is None and optional)
            if not fits:
                raise TypeError(f"{name}={value!r} should be {kind.__name__}")
        return build(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as fault:
        raise ConfigError(f"{source} is not a valid config ({fault}); restore it or start a new run") from None
