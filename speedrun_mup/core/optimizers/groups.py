"""Hyperparameters at base width -> parameter groups, scaled by the rule table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from speedrun_mup.core import mup


@dataclass(frozen=True)
class GroupHyperparams:
    """Hyperparameters of one parameter group, as tuned at base width. optimizer: "adam" or "muon"."""

    optimizer: str
    lr: float
    weight_decay: float = 0.0
    eps: float = 1e-10


def param_groups(
    model: nn.Module, table: mup.Parametrization, tuned: Mapping[str, GroupHyperparams]
) -> dict[str, list[dict[str, Any]]]:
    """One parameter group per parameter, by optimizer name, with every value scaled from base width by the rule table.

    tuned: by the group that each parameter declared. Muon's LR includes the factor sqrt(max(1, d_out / d_in)) at base
    shape. Raises KeyError for a parameter whose group is not in `tuned`.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, parameter, spec in mup.named_specs(model):
        base = tuned[spec.group]
        factors = spec.factors(table, base.optimizer)
        shape_factor = math.sqrt(max(1.0, spec.base_fan_out / spec.base_fan_in)) if base.optimizer == "muon" else 1.0
        lr = base.lr * shape_factor * factors.lr
        group = {
            "params": [(name, parameter)],
            "lr": lr,
            "initial_lr": lr,
            "weight_decay": base.weight_decay * factors.weight_decay,
        }
        if base.optimizer == "adam":
            group["eps"] = base.eps * factors.eps
        groups.setdefault(base.optimizer, []).append(group)
    return groups
