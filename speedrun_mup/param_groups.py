"""Groups of parameters with hyperparameters of their own: one table, from which their settings and flags are made."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, NamedTuple, TypeVar

from speedrun_mup.core.optimizers.registry import OPTIMIZERS
from speedrun_mup.settings import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Valid, setting, settings_of

T = TypeVar("T", bound=type)


class ParamGroup(NamedTuple):
    """A group of parameters with hyperparameters of its own, at base width. Each is a setting, such as matrix_lr.

    Attributes:
        about: what is in it, for `--help`.
        lr: the learning rate.
        optimizer: its name.
        weight_decay, eps, beta1, beta2: None is what is common to all groups: weight_decay, adam_eps and so on.
        shown: the hyperparameters that `--help` lists; the others have flags as well.
        also: further groups that models declare, with the same hyperparameters.
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
    "gate": ParamGroup("gates of attention heads", lr=0.008, beta1=0.9, beta2=0.99),  # record 56; before, Muon
}


class Hyperparams(NamedTuple):
    """What a group of parameters has at base width. lr: with lr_scale."""

    optimizer: str
    lr: float
    weight_decay: float
    eps: float
    betas: tuple[float, float]


def with_param_groups(config: T) -> T:
    """Give a class of settings, which is to be a dataclass, those of PARAM_GROUPS."""
    for group, entry in PARAM_GROUPS.items():
        for name, kind, declared in entry.fields(group):
            config.__annotations__[name] = kind
            setattr(config, name, declared)
    return config


def hyperparams_of(cfg: Any) -> dict[str, Hyperparams]:
    """The hyperparameters of every group that models declare; what a group has none of is the common value."""
    common = {"weight_decay": cfg.weight_decay, "eps": cfg.adam_eps, "beta1": cfg.adam_beta1, "beta2": cfg.adam_beta2}
    found, kind = {}, cfg.__class__
    for group, names in _names_by_group(kind).items():
        own = {key: getattr(cfg, name) for key, name in names.items()}
        values = {key: common[key] if value is None else value for key, value in own.items()}
        betas = values.pop("beta1"), values.pop("beta2")
        found[group] = Hyperparams(**values | {"lr": values["lr"] * cfg.lr_scale, "betas": betas})
    return found


@functools.cache
def _names_by_group(kind: Any) -> dict[str, dict[str, str]]:
    """Parameter group -> hyperparameter -> the setting's name."""
    found: dict[str, dict[str, str]] = {}
    for name, meta in settings_of(kind).items():
        for group in meta.param_groups:
            found.setdefault(group, {})[name.removeprefix(f"{meta.param_groups[0]}_")] = name
    return found
