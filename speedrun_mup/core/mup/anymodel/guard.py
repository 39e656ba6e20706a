"""A warning where an optimizer that knows nothing of muP trains an adapted model: at its first step.

Hugging Face's Trainer and others make an optimizer of their own if they are given none. It has one rate for all
parameters, so the model trains, but with rates that do not transfer. torch calls a hook before a step of any optimizer.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, NoRuleError, Update
from speedrun_mup.core.mup.spec import UndeclaredParameterError, named_specs


class PlainOptimizerWarning(UserWarning):
    """An optimizer has one rate for parameters whose rates differ in muP."""


_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_hooks: list[Any] = []


def watch(model: nn.Module) -> None:
    """Warn once if an optimizer with plain rates trains `model`. Nothing keeps the model alive, or is stored in it."""
    _watched.add(model)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_look))


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """torch's hook before a step of any optimizer."""
    if not _watched or "mup_split" in vars(optimizer) or optimizer in _seen:
        return
    _seen.add(optimizer)
    for model in list(_watched):
        found = _one_rate_for(model, optimizer)
        if found is not None:
            _watched.discard(model)
            _warn(optimizer, model, *found)


def _one_rate_for(model: nn.Module, optimizer: Optimizer) -> tuple[str, str, float] | None:
    """(two parameters of one group whose rates in muP differ, by how much), if there are any."""
    try:
        specs = {id(p): (name, spec) for name, p, spec in named_specs(model)}
    except UndeclaredParameterError:  # flattened into parameters of a wrapper's own
        return None
    for group in optimizer.param_groups:
        kind = Update.GRADIENT if isinstance(optimizer, SGD) else Update.ENTRYWISE
        if group.get("use_muon") or (kind is Update.ENTRYWISE and "betas" not in group):
            continue  # of another kind, whose factors would have to be known
        members = [specs[id(p)] for p in group["params"] if id(p) in specs]
        try:
            rates = {name: spec.factors(PARAMETRIZATIONS["mup"], kind).lr for name, spec in members}
        except NoRuleError:
            continue
        most, least = (which(rates, key=rates.__getitem__, default="") for which in (max, min))
        if rates and rates[most] > 1.001 * rates[least]:
            return most, least, rates[most] / rates[least]
    return None


def _warn(optimizer: Optimizer, model: nn.Module, most: str, least: str, ratio: float) -> None:
    warnings.warn(
        f"{type(optimizer).__name__} trains a {type(model).__name__} that is in muP with one rate for all, so its rate will "
        f"not transfer: {most} should have {ratio:g} times that of {least}. Make it with mup.optimizer(model, lr=...), or "
        "give it mup.param_groups(model, lr=...); Hugging Face's Trainer takes it as optimizers=(optimizer, None)",
        PlainOptimizerWarning,
        stacklevel=5,
    )
