"""How a run scales: its rules in a line, and settings of what follows depth, batch and tokens, each off unless asked for.

The rules themselves are data in core/mup/depth_rules.py and core/mup/run_rules.py. Imports no torch, so that `--help` and a
misspelt flag answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from speedrun_mup.core.mup.depth_rules import DEPTH_RULES, depth_rule
from speedrun_mup.core.mup.run_rules import BATCH_RULES, TOKENS_RULES, RunScaling
from speedrun_mup.flags import LARGEST
from speedrun_mup.settings import at_least, at_most, setting, with_settings

C = TypeVar("C", bound=type)


class ScaledAxis(NamedTuple):
    """What the settings of one axis besides width are called.

    Attributes:
        base: the setting of where values were tuned; alone it means the usual rule.
        rule: the setting of the rule; alone it takes the preset's own size as the base.
        usual: the rule that a base alone means.
        size: settings -> how large a run or model is on this axis.
    """

    base: str
    rule: str
    usual: str
    size: Callable[[Mapping[str, Any]], int]


def _batch(values: Mapping[str, Any]) -> int:
    return values["micro_batches"] * values["micro_batch_tokens"]


AXES: dict[str, ScaledAxis] = {
    "depth": ScaledAxis("base_layers", "depth_rule", "completep", lambda values: values["n_layer"]),
    "batch": ScaledAxis("base_batch_tokens", "batch_rule", "marin", _batch),
    "tokens": ScaledAxis("base_tokens", "tokens_rule", "bjorck", lambda values: values["iterations"] * _batch(values)),
}


def _base(kind: str, most: int) -> Any:
    text = f"{kind} that the learning rates were tuned at; switches a rule on (default: the preset's, with a rule)"
    return int | None, setting("scaling", text, None, affects="result", valid=(at_most(most), at_least(1)))


def _rule(axis: str, rules: Collection[str]) -> Any:
    text = f"rule for scaling with {axis}"
    return str, setting("scaling", text, "none", affects="result", choices=tuple(rules))


def _exponent(text: str, needs: str) -> Any:
    valid = (at_most(4), at_least(-4))
    about = f"{text} (default: the rule's)"
    return float | None, setting("scaling", about, None, affects="result", valid=valid, needs=needs)


def _of_rates(axis: str, base: str) -> Iterator[tuple[str, Any]]:
    yield f"{axis}_lr_exponent", _exponent(f"of {axis} / base {axis}, in all learning rates", base)
    yield f"{axis}_muon_lr_exponent", _exponent("the same for Muon and other spectral updates alone", base)


SCALING_SETTINGS: dict[str, tuple[Any, Any]] = {
    "base_layers": _base("layers", 4096),
    "depth_rule": _rule("depth", DEPTH_RULES),
    "depth_branch_exponent": _exponent("of layers / base layers, in the factor on what a layer adds", "base_layers"),
    "depth_lr_exponent": _exponent("the same in the learning rates inside layers", "base_layers"),
    "base_batch_tokens": _base("tokens of a step", LARGEST),
    "batch_rule": _rule("the batch", BATCH_RULES),
    **dict(_of_rates("batch", "base_batch_tokens")),
    "base_tokens": _base("tokens of a run", LARGEST),
    "tokens_rule": _rule("the tokens of a run", TOKENS_RULES),
    **dict(_of_rates("tokens", "base_tokens")),
}


def with_scaling_settings(config: C) -> C:
    """Give a class of settings, which is to be a dataclass, those of SCALING_SETTINGS."""
    return with_settings(config, ((name, *entry) for name, entry in SCALING_SETTINGS.items()))


def switched_on(asked: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that `asked` implies: a base alone means the usual rule, a rule alone takes the preset's own size."""
    implied: dict[str, Any] = {}
    for axis in AXES.values():
        if asked.get(axis.base) is not None:
            implied |= {} if axis.rule in asked else {axis.rule: axis.usual}
        elif asked.get(axis.rule, "none") != "none":
            implied[axis.base] = axis.size(preset)
    return implied


def depth_of(cfg: Any) -> dict[str, Any]:
    """What a model's config takes of the settings `cfg`: base layers, and the rule with exponents of the user's own."""
    rule = depth_rule(cfg.depth_rule).changed(cfg.depth_branch_exponent, cfg.depth_lr_exponent)
    return {"base_layers": cfg.base_layers, "depth_rule": rule}


def run_scaling(cfg: Any) -> RunScaling:
    """The rules of a run with the settings `cfg` for batch and tokens, and how far it is from their bases."""
    batch = BATCH_RULES[cfg.batch_rule].changed(cfg.batch_lr_exponent, cfg.batch_muon_lr_exponent)
    tokens = TOKENS_RULES[cfg.tokens_rule].changed(cfg.tokens_lr_exponent, cfg.tokens_muon_lr_exponent)
    m_batch = cfg.batch_tokens / cfg.base_batch_tokens if cfg.base_batch_tokens else 1.0
    m_tokens = cfg.schedule.tokens / cfg.base_tokens if cfg.base_tokens else 1.0
    return RunScaling(batch, tokens, m_batch, m_tokens)


# Settings with which nothing but width is scaled.
WITHOUT_BASES: dict[str, Any] = {axis.base: None for axis in AXES.values()}


def scaling_in_force(cfg: Any) -> str:
    """The rules beyond width of a run with the settings `cfg`, each after a semicolon; nothing if there are none."""
    bases = ((name, axis, getattr(cfg, axis.base)) for name, axis in AXES.items())
    units = {"depth": "layers", "batch": "tokens a step", "tokens": "tokens"}
    return "".join(
        f"; {name}: {getattr(cfg, axis.rule)} from {base:,} {units[name]}" for name, axis, base in bases if base
    )


def rules_in_force(cfg: Any) -> str:
    """How a run with the settings `cfg` scales with width, and with what else it does, as a line for its reader."""
    more = scaling_in_force(cfg)
    name = "muP" if cfg.parametrization == "mup" else cfg.parametrization
    if cfg.parametrization == "record26":
        return f"rules: the record's own (no muP; --mup switches it on){more}"
    own = ", the width of this model: every factor is 1" if cfg.tuned_width == cfg.width else ""
    return f"rules: {name} from base width {cfg.tuned_width}{own}{more}"
