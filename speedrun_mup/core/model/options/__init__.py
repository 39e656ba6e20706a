"""Techniques of later records, one a file, none in force unless a setting asks for it.

A file holds a config with `build`, the module that it builds, and what the module declares of its parameters: role, first
values, parameter group, uses. TECHNIQUES says which setting adds it to a model's config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from speedrun_mup.core.model.gpt import GPTConfig
from speedrun_mup.core.model.options.gates import add_attention_gate

# By the name of the setting, whose value is the second argument if it is not 0, False or None; applied in this order.
TECHNIQUES: dict[str, Callable[[GPTConfig, Any], GPTConfig]] = {"attention_gate": add_attention_gate}


def with_techniques(cfg: GPTConfig, settings: object) -> GPTConfig:
    """`cfg` with every technique that `settings`, a TrainConfig, asks for."""
    for name, add in TECHNIQUES.items():
        if value := getattr(settings, name, None):
            cfg = add(cfg, value)
    return cfg
