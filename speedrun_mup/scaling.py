"""Settings of what follows the depth of a model, each off unless asked for. The rules themselves are in core/mup/depth_rules.py.

Imports no torch, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

from typing import Any, TypeVar

from speedrun_mup.core.mup.depth_rules import DEPTH_RULES, depth_rule
from speedrun_mup.settings import at_least, at_most, setting, with_settings

C = TypeVar("C", bound=type)
EXPONENT = (at_most(4), at_least(-4))
SCALING_SETTINGS: dict[str, tuple[Any, Any]] = {
    "base_layers": (
        int | None,
        setting(
            "scaling",
            "layers that the learning rates were tuned at; switches a depth rule on (default: the preset's with a depth rule)",
            None,
            affects="result",
            valid=(at_most(4096), at_least(1)),
        ),
    ),
    "depth_rule": (
        str,
        setting("scaling", "rule for scaling with depth", "none", affects="result", choices=tuple(DEPTH_RULES)),
    ),
    "depth_branch_exponent": (
        float | None,
        setting(
            "scaling",
            "of layers / base layers, in the factor on what a layer adds (default: the depth rule's)",
            None,
            affects="result",
            valid=EXPONENT,
            needs="base_layers",
        ),
    ),
    "depth_lr_exponent": (
        float | None,
        setting(
            "scaling",
            "the same in the learning rates inside layers (default: the depth rule's)",
            None,
            affects="result",
            valid=EXPONENT,
            needs="base_layers",
        ),
    ),
}


def with_scaling_settings(config: C) -> C:
    """Give a class of settings, which is to be a dataclass, those of SCALING_SETTINGS."""
    return with_settings(config, ((name, *entry) for name, entry in SCALING_SETTINGS.items()))


def switched_on(asked: dict[str, Any], preset_layers: int) -> dict[str, Any]:
    """The settings that `asked` implies: base layers alone mean CompleteP, a depth rule alone takes the preset's layers."""
    if asked.get("base_layers") is not None:
        return {} if "depth_rule" in asked else {"depth_rule": "completep"}
    return {"base_layers": preset_layers} if asked.get("depth_rule", "none") != "none" else {}


def depth_of(cfg: Any) -> dict[str, Any]:
    """What a model's config takes of the settings `cfg`: base layers, and the rule with exponents of the user's own."""
    rule = depth_rule(cfg.depth_rule).changed(cfg.depth_branch_exponent, cfg.depth_lr_exponent)
    return {"base_layers": cfg.base_layers, "depth_rule": rule}


def scaling_in_force(cfg: Any) -> str:
    """What follows depth in this run, after what follows width; empty if nothing does."""
    return f"; depth: {cfg.depth_rule} from {cfg.base_layers} layers" if cfg.base_layers else ""
