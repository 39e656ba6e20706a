"""The arms of a sweep: rule tables with their optimizers, by name, and variants of them with settings of their own."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speedrun_mup.config import settings, swept_settings, types
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup import PARAMETRIZATIONS
from speedrun_mup.core.optimizers import OPTIMIZERS
from speedrun_mup.flags import whole_number
from speedrun_mup.param_groups import given_to
from speedrun_mup.settings import flag_of


@dataclass(frozen=True)
class Arm:
    """One parametrization, as settings. predicted: the drift that a control must have, log2 per doubling of width.

    The prediction is for a hyperparameter of just what is scaled wrongly. lr_scale is a factor on groups that are right as
    well, and the common optimum then lies between, so the sign is what counts.
    """

    name: str
    settings: Mapping[str, Any]
    predicted: float | None = None


# adam-sp is the table "sp", not "adam-constant": what people do without muP. A constant rate is then too fast by m in
# hidden matrices and readout; both call for half the rate per doubling, which shows even where one factor is on all rates.
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("mup", {"parametrization": "mup", **given_to("muon")}),
        Arm("record26", {"parametrization": "record26", **given_to("muon")}),
        Arm("adam-mup", {"parametrization": "mup", **given_to("adam")}),
        Arm("adam-sp", {"parametrization": "sp", **given_to("adam")}, predicted=-1.0),
        Arm("muon-sqrt-m", {"parametrization": "muon-sqrt-m", **given_to("muon")}, predicted=-0.5),
        Arm("muon-over-m", {"parametrization": "muon-over-m", **given_to("muon")}, predicted=1.0),
    )
}


def arm_name(optimizer: str, table: str) -> str:
    """How an arm is called: by its rule table alone where Muon has the hidden matrices."""
    return table if optimizer == "muon" else f"{optimizer}-{table}"


def pick_arms(names: Iterable[str]) -> tuple[Arm, ...]:
    """The arms called `names`: those of ARMS, or any OPTIMIZER-TABLE. Raises ConfigError for an unknown one."""
    return tuple(_pick_arm(name) for name in names)


def _pick_arm(name: str) -> Arm:
    if "+" in name:
        whole, *changes = name.split("+")
        arm = _pick_arm(whole)
        return Arm(name, {**arm.settings, **dict(change_of(name, text) for text in changes)})
    if name in ARMS:
        return ARMS[name]
    for optimizer, table in itertools.product(OPTIMIZERS, PARAMETRIZATIONS):
        if name == arm_name(optimizer, table):
            return Arm(name, {"parametrization": table, **given_to(optimizer)})
    table = name.removeprefix("muon-")
    if table in PARAMETRIZATIONS:
        raise ConfigError(f"arm {name!r} is called {table} here: an arm without an optimizer in its name has Muon")
    raise ConfigError(
        f"arm {name!r} is unknown; choose from {', '.join(ARMS)}, or OPTIMIZER-TABLE with an optimizer of "
        f"{', '.join(OPTIMIZERS)} and a rule table of {', '.join(PARAMETRIZATIONS)}, and any of these with settings of its own: "
        "mup+depth_rule=none"
    )


def change_of(arm: str, text: str) -> tuple[str, Any]:
    """The setting and value of SETTING=VALUE in an arm's name. Raises ConfigError."""
    name, _, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in settings() or not settings()[name].is_result:
        raise ConfigError(f"arm {arm}: no setting {name!r} changes what a run computes; give ARM+SETTING=VALUE")
    kind, optional = types()[name]
    if optional and value == "none" and kind is not str:
        return name, None
    try:
        read: Callable[[str], Any] = {int: whole_number, bool: _yes_or_no}.get(kind, kind)
        return name, read(value)
    except (ValueError, argparse.ArgumentTypeError):
        raise ConfigError(f"arm {arm}: {name}={value} should be {kind.__name__}") from None


def _yes_or_no(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else bool(int(text))


def is_variant(arm: str, arms: Collection[str]) -> bool:
    """Whether an arm is another one of `arms` with settings of its own, which it is then held against."""
    return "+" in arm and arm.partition("+")[0] in arms


def check_given(arms: Sequence[Arm], given: Mapping[str, Any]) -> None:
    """ConfigError if the user gave a setting that an arm fixes otherwise: no arm overrides a user silently."""

    def clashes(arm: Arm) -> list[str]:
        return [name for name in given if arm.settings.get(name, given[name]) != given[name]]

    def as_given(arm: Arm) -> Arm:
        """The arm with the optimizer and the rules that were given, where they were."""
        both = {"matrix_optimizer": "muon", **arm.settings, **given}
        return _pick_arm(arm_name(both["matrix_optimizer"], both["parametrization"]))

    for arm in arms:
        for name in clashes(arm):
            fit = dict.fromkeys(one.name for one in (*ARMS.values(), *map(as_given, arms)) if not clashes(one))
            choice = f"choose among --arms {' '.join(fit)}" if fit else "give fewer settings: no arm has all of these"
            tuned = f", or sweep it with --hyperparameter {name}" if name in swept_settings() else ""
            why = f"{flag_of(name)} {given[name]}: arm {arm.name} fixes {name} at {arm.settings[name]}"
            raise ConfigError(f"{why}; leave {flag_of(name)} out{tuned}, or {choice}")
