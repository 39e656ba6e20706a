"""Groups of parameters with hyperparameters of their own: one table, from which their settings and flags are made."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypeVar

from speedrun_mup.core.optimizers.registry import OPTIMIZERS
from speedrun_mup.settings import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Valid,
    flag_of,
    setting,
    settings_of,
    with_settings,
)

T = TypeVar("T", bound=type)


class ParamGroup(NamedTuple):
    """A group of parameters with hyperparameters of its own, at base width. Each is a setting, such as matrix_lr.

    Attributes:
        about: what is in it, for `--help`.
        lr: the learning rate.
        optimizer: its name.
        weight_decay: None is the weight_decay that is common to all groups.
        eps, beta1, beta2: None is adam_eps and so on with Adam, else the optimizer's own default.
        shown: the hyperparameters that `--help` lists; the others have flags as well.
        also: further groups that models declare, with the same hyperparameters.
        needs: the setting that gives it parameters when it is not at its default.
    """

    about: str
    lr: float
    optimizer: str = "adam"
    weight_decay: float | None = None
    eps: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    shown: Collection[str] = ("lr",)
    also: Collection[str] = ()
    needs: str = ""

    def fields(self, name: str) -> list[tuple[str, Any, Any]]:
        """The settings of the group `name`, as `dataclasses.make_dataclass` takes them."""
        made = []
        for key, (group, kind, valid) in _HYPERPARAMETERS.items():
            field = setting(
                group,
                self.about if key == "lr" else f"{key.replace('_', ' ')} of {self.about}",
                getattr(self, key),
                affects="result",
                choices=OPTIMIZERS if key == "optimizer" else (),
                valid=(valid,) if valid else (),
                shown=key in self.shown,
                param_groups=(name, *self.also),
                needs=self.needs,
            )
            made.append((f"{name}_{key}", kind, field))
        return made


_HYPERPARAMETERS: dict[str, tuple[str, Any, Valid | None]] = {
    "lr": ("optimizer", float, POSITIVE),
    "optimizer": ("optimizer", str, None),
    "weight_decay": ("optimizer", float | None, NOT_NEGATIVE),
    "eps": ("optimizer", float | None, POSITIVE),
    "beta1": ("momentum", float | None, BELOW_ONE),
    "beta2": ("momentum", float | None, BELOW_ONE),
}
PARAM_GROUPS = {
    "matrix": ParamGroup("hidden matrices", lr=0.05, optimizer="muon", shown=("lr", "optimizer")),
    "embed": ParamGroup("embedding and value embeddings", lr=0.6, also=("value_embed",)),
    "head": ParamGroup("readout", lr=0.22),
    # 1e-10 lets their first noisy gradient take a full-size step
    "scalar": ParamGroup("skip weights and mixing coefficients", lr=0.04, eps=1e-10),
}
# (group, optimizer) -> its learning rate at base width, where it has another optimizer than its own.
RATES = {
    # The best of a sweep of matrix_lr alone, laptop preset at width 64, one seed; record 26 gives Adam multiples of it
    ("matrix", "adam"): 0.008,
    # As published for track 3
    ("matrix", "muonh"): 0.018,
    ("matrix", "adamh"): 0.018,
    ("matrix", "soap-muon"): 0.0375,
}
# Settings that the hidden matrices' optimizer needs; each is its default there.
NEEDS: dict[str, dict[str, Any]] = {name: {"hidden_init": "track3"} for name in ("muonh", "adamh", "soap-muon")}
_COMMON = {  # settings of several groups -> the hyperparameter
    "weight_decay": "weight_decay",
    "adam_eps": "eps",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "momentum": "momentum",
    "momentum_start": "momentum",
    "momentum_warmup": "momentum",
    "orthogonalizer": "orthogonalizer",
}


class Hyperparams(NamedTuple):
    """What a group of parameters has at base width. lr: with lr_scale; None is the optimizer's own default."""

    optimizer: str
    lr: float
    weight_decay: float
    eps: float | None
    betas: tuple[float | None, float | None]


def with_param_groups(config: T) -> T:
    """Give a class of settings, which is to be a dataclass, those of PARAM_GROUPS."""
    return with_settings(config, (field for name, entry in PARAM_GROUPS.items() for field in entry.fields(name)))


def given_to(optimizer: str, group: str = "matrix") -> dict[str, Any]:
    """The settings that give a group to an optimizer: its name, what it needs, and its rate where RATES has one."""
    rate = RATES.get((group, optimizer))
    return {f"{group}_optimizer": optimizer} | NEEDS.get(optimizer, {}) | ({f"{group}_lr": rate} if rate else {})


def with_rates(asked: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that were asked for, and what groups that are to have another optimizer than `usual` take by RATES and NEEDS."""
    found = NEEDS.get(asked.get("matrix_optimizer", ""), {}) | dict(asked)
    for (group, optimizer), rate in RATES.items():
        if asked.get(f"{group}_optimizer") == optimizer != usual.get(f"{group}_optimizer"):
            found.setdefault(f"{group}_lr", rate)
    return found


def hyperparams_of(cfg: Any) -> dict[str, Hyperparams]:
    """The hyperparameters of every group that models declare; what a group has none of is the common value, if it has one."""
    found, kind = {}, cfg.__class__
    for group, names in _names_by_group(kind).items():
        own = {key: getattr(cfg, name) for key, name in names.items()}
        common = {_COMMON[name]: getattr(cfg, name) for name in _COMMON if _is_common_to(name, own["optimizer"])}
        values: dict[str, Any] = {key: common.get(key) if value is None else value for key, value in own.items()}
        betas = values.pop("beta1"), values.pop("beta2")
        found[group] = Hyperparams(**values | {"lr": values["lr"] * cfg.lr_scale, "betas": betas})
    return found


def rates_of(cfg: Any, optimizer: str) -> tuple[str, ...]:
    """The settings of the learning rates of all groups of parameters that `cfg` gives this optimizer."""
    made, found = settings_of(cfg.__class__), dict[str, None]()
    for names in _names_by_group(cfg.__class__).values():
        needs = made[names["lr"]].needs
        if getattr(cfg, names["optimizer"]) == optimizer and (not needs or getattr(cfg, needs)):
            found[names["lr"]] = None
    return tuple(found)


def _is_common_to(name: str, optimizer: str) -> bool:
    """Whether groups of parameters with this optimizer take the setting, one of _COMMON. Those of Adam are Adam's alone."""
    return optimizer == "adam" or not name.startswith("adam_")


def _is_off(cfg: Any, needed: str) -> bool:
    """Whether a setting that another one needs, if it needs one, has its default."""
    return bool(needed) and getattr(cfg, needed) == getattr(cfg.__class__, needed)


def without_effect(cfg: Any, name: str) -> str:
    """Why no group of parameters of `cfg` reads the setting, and what would; nothing if one does, or it is of another kind."""
    made, names = settings_of(cfg.__class__), _names_by_group(cfg.__class__)
    own, needs = made[name].param_groups[:1], made[name].needs
    if _is_off(cfg, needs):
        return f"{name} has no effect without {needs}; leave it out, or give {flag_of(needs)}"
    if not own and name not in _COMMON:
        return ""
    key = name.removeprefix(f"{own[0]}_") if own else _COMMON[name]
    if key in ("optimizer", "lr"):
        return ""
    groups = [names[group] for group in own or names]
    groups = [group for group in groups if not _is_off(cfg, made[group["lr"]].needs)]
    fit = [each for each in OPTIMIZERS if OPTIMIZERS[each].has(key) and (own or _is_common_to(name, each))]
    able = [group for group in groups if getattr(cfg, group["optimizer"]) in fit]
    if any(own or key not in group or getattr(cfg, group[key]) is None for group in able):
        return ""
    if able:
        return f"{name} has no effect next to {', '.join(dict.fromkeys(group[key] for group in able))}; leave it out"
    used = sorted({getattr(cfg, group["optimizer"]) for group in groups})
    flag = flag_of(f"{own[0] if own else 'matrix'}_optimizer")
    return f"{name} has no effect on {', '.join(used)}; leave it out, or choose {' or '.join(fit)} with {flag}"


@functools.cache
def _names_by_group(kind: Any) -> dict[str, dict[str, str]]:
    """Parameter group -> hyperparameter -> the setting's name."""
    found: dict[str, dict[str, str]] = {}
    for name, meta in settings_of(kind).items():
        for group in meta.param_groups:
            found.setdefault(group, {})[name.removeprefix(f"{meta.param_groups[0]}_")] = name
    return found
