"""What techniques add to the hyperparameters of parameter groups: functions (tuned values, setting) -> tuned values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.optimizers.groups import GroupHyperparams
from speedrun_mup.core.optimizers.registry import OPTIMIZERS

Tuned = Mapping[str, GroupHyperparams]


def add_cautious_decay(tuned: Tuned, wanted: bool) -> Tuned:
    """`tuned` with cautious decay in every group that decays. ConfigError if none does, or one of them cannot."""
    decaying = {name: group for name, group in tuned.items() if group.weight_decay}
    if not decaying:
        raise ConfigError("cautious_decay has no effect without weight decay; leave it out, or give --weight-decay")
    for name, group in decaying.items():
        if not OPTIMIZERS[group.optimizer].has("cautious"):
            able = ", ".join(each for each in OPTIMIZERS if OPTIMIZERS[each].has("cautious"))
            raise ConfigError(f"cautious_decay: {group.optimizer}, which has group {name}, cannot; choose {able}")
    return {**tuned, **{name: _with(group, cautious=True) for name, group in decaying.items()}}


def _with(group: GroupHyperparams, **options: object) -> GroupHyperparams:
    return replace(group, options={**group.options, **options})
