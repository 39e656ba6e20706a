"""Hyperparameters at base width -> parameter groups, scaled by the rule table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from speedrun_mup.core import mup
from speedrun_mup.core.mup.run_rules import NO_RUN_SCALING, RunFactors, RunScaling
from speedrun_mup.core.optimizers.registry import OPTIMIZERS


@dataclass(frozen=True)
class GroupHyperparams:
    """Hyperparameters of one parameter group, as tuned at base width. None is the optimizer's own default.

    Each goes to optimizers that have one of that name; of `betas` also one to an optimizer that has a beta1 or beta2 alone.
    optimizer: its name in OPTIMIZERS. options: what techniques add, by name.
    """

    optimizer: str
    lr: float
    weight_decay: float = 0.0
    eps: float | None = 1e-10
    betas: tuple[float | None, float | None] | None = None
    momentum: float | None = None
    orthogonalizer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def param_groups(
    model: nn.Module,
    table: mup.Parametrization,
    tuned: Mapping[str, GroupHyperparams],
    run: RunScaling = NO_RUN_SCALING,
) -> dict[str, list[dict[str, Any]]]:
    """One parameter group per parameter, by optimizer name, with every value scaled from base by the rules.

    Args:
        model: declares a role and a group for each parameter.
        table: says how values scale for the optimizer's kind of update.
        tuned: values at base, by the group that a parameter declared.
        run: the rules of the run for batch and tokens.

    Returns:
        {"adam": [group, ...], ...}. Learning rates include the optimizer's factor for the shape at base width.

    Raises:
        KeyError: a parameter's group is not in `tuned`.
        NoRuleError: an optimizer must not own a parameter.
        ConfigError: an optimizer is unknown; a rule of the run says nothing of it, or takes a beta out of [0, 1).
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, parameter, spec in mup.named_specs(model):
        base = tuned[spec.group]
        optimizer = OPTIMIZERS[base.optimizer]
        try:
            factors = spec.factors(table, optimizer.kind)
        except mup.NoRuleError as fault:
            raise mup.NoRuleError(f"{base.optimizer} for {name}, in group {spec.group}: {fault}") from None
        of_run = run.factors(optimizer.kind)
        lr = base.lr * optimizer.shape_factor(spec) * factors.lr * of_run.lr
        decay = base.weight_decay * factors.weight_decay * of_run.weight_decay
        group = {
            "params": [(name, parameter)],
            "lr": lr,
            "initial_lr": lr,
            "weight_decay": decay,
            "initial_weight_decay": decay,
        }
        group |= _others(base, optimizer.defaults, factors.eps, of_run)
        group |= optimizer.options_for(spec)
        groups.setdefault(base.optimizer, []).append(group)
    return groups


def _others(
    base: GroupHyperparams, defaults: Mapping[str, Any], eps_factor: float, of_run: RunFactors
) -> dict[str, Any]:
    """What an optimizer with these defaults has besides rate and decay, but for its own defaults."""
    eps = defaults.get("eps") if base.eps is None else base.eps
    own = base.betas or (None, None)
    usual = defaults.get("betas") or (defaults.get("beta1"), defaults.get("beta2"))
    given = [mine if mine is not None else theirs for mine, theirs in zip(own, usual, strict=True)]
    betas = [beta if beta is None else of_run.beta(which, beta) for which, beta in enumerate(given)]
    untouched = own == (None, None) and betas == given
    others = {
        "eps": eps and eps * eps_factor * of_run.eps,
        "betas": None if untouched else tuple(betas),
        "beta1": None if own[0] is None and betas == given else betas[0],
        "beta2": None if own[1] is None and betas == given else betas[1],
        "momentum": base.momentum,
        "orthogonalizer": base.orthogonalizer,
        **base.options,
    }
    return {key: value for key, value in others.items() if key in defaults and value is not None}
