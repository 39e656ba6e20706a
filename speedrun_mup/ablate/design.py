"""Which arms an ablation trains: the base, a placebo, and each technique added to the base and left out of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from speedrun_mup.config import TECHNIQUES, TrainConfig, settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.optimizers import OPTIMIZERS
from speedrun_mup.param_groups import given_to
from speedrun_mup.sweep.arms import Arm, change_of

BASE, PLACEBO, ALL = "base", "placebo", "all"
NUDGE = 1.001  # of the placebo's learning rate: rounding makes its runs others, and nothing makes them better or worse
DESIGNS = ("both", "add", "leave")


class Comparison(NamedTuple):
    """A gain is the loss of the arm `without` minus that of the arm `with_it`."""

    name: str
    with_it: str
    without: str


@dataclass(frozen=True)
class Design:
    """The arms, the base first, and what is compared, the placebo last."""

    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]


def techniques_of(names: Iterable[str], base: TrainConfig) -> dict[str, dict[str, Any]]:
    """Settings that switch on each technique called for, by name.

    Args:
        names: of `TECHNIQUES`, of optimizers for hidden matrices, or SETTING=VALUE, several with + between; "all" is every
            technique that says how an ablation has it.
        base: what they are added to.

    Raises:
        ConfigError: for one that is unknown, is there twice, has no value to be switched on with, or that the base has.
    """
    found: dict[str, dict[str, Any]] = {}
    every = [name for name, entry in TECHNIQUES.items() if entry.switched_on(name)]
    for name in [each for asked in names for each in (every if asked == ALL else [asked])]:
        if name in found:
            raise ConfigError(f"--techniques: {name} is there twice")
        found[name] = _settings_of(name)
        if all(getattr(base, key) == value for key, value in found[name].items()):
            raise ConfigError(f"--techniques {name}: the base has it; leave it out of the settings, or of --techniques")
    return found


def _settings_of(name: str) -> dict[str, Any]:
    if "=" in name:
        return dict(change_of(name, text) for text in name.split("+"))
    plain = name.replace("-", "_")
    if plain in TECHNIQUES:
        if found := TECHNIQUES[plain].switched_on(plain):
            return found
        raise ConfigError(f"--techniques {name}: with which value? give {plain}=VALUE")
    if name in OPTIMIZERS:
        return given_to(name)
    known = [each for each, entry in TECHNIQUES.items() if entry.switched_on(each)]
    raise ConfigError(
        f"--techniques {name} is unknown; choose all, {', '.join([*known, *OPTIMIZERS])}, or any SETTING=VALUE"
    )


def design_of(techniques: Mapping[str, Mapping[str, Any]], base: TrainConfig, design: str = "both") -> Design:
    """The arms for these techniques, by name.

    Args:
        techniques: settings of each.
        base: the settings of the base.
        design: "add" adds each to the base, "leave" leaves each out of all of them, "both" does both.

    Raises:
        ConfigError: two techniques set the same thing, so that no arm has all of them.
    """
    arms, comparisons = [Arm(BASE, {})], []
    if design in ("both", "add"):
        arms += [Arm(f"with {name}", made) for name, made in techniques.items()]
        comparisons += [Comparison(f"{name} added", f"with {name}", BASE) for name in techniques]
    if design in ("both", "leave") and len(techniques) > 1:
        arms.append(Arm(ALL, _together(techniques)))
        for name in techniques:
            rest = {other: made for other, made in techniques.items() if other != name}
            arms.append(Arm(f"without {name}", _together(rest)))
            comparisons.append(Comparison(f"{name} left out", ALL, f"without {name}"))
    if not comparisons:
        raise ConfigError(f"--design {design} needs two techniques; give more, or --design add")
    arms.append(Arm(PLACEBO, {"lr_scale": base.lr_scale * NUDGE}))
    return Design(tuple(arms), (*comparisons, Comparison(PLACEBO, PLACEBO, BASE)))


def _together(techniques: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of all."""
    owner: dict[str, str] = {}
    together: dict[str, Any] = {}
    for name, made in techniques.items():
        for key, value in made.items():
            if together.get(key, value) != value:
                raise ConfigError(
                    f"--techniques: {owner[key]} and {name} both set {key}, so no arm has all of them; give --design add"
                )
            owner[key], together[key] = name, value
    return together


def told(design: Design, techniques: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """A line for each technique: what it sets."""
    order = list(settings())
    lines = []
    for name, made in techniques.items():
        shown = ", ".join(f"{key} {made[key]}" for key in sorted(made, key=order.index))
        lines.append(f"technique: {name}: {shown}")
    return [*lines, f"arms: {len(design.arms)}, with a placebo whose learning rate is {NUDGE} times the base's"]
