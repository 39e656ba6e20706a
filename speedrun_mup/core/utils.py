"""The names of `core.device`, `core.distributed` and `core.seeds` in one place, for those who import them from here."""

from speedrun_mup.core.device import deterministic, has_triton, is_out_of_memory, pick_device
from speedrun_mup.core.distributed import (
    PARENT_DIED,
    Handle,
    TreeSum,
    World,
    join_world,
    leave_world,
    stop_with_parent,
    told_of_slurm,
    tree_sum,
)
from speedrun_mup.core.seeds import generator, seed_for

__all__ = [
    "PARENT_DIED",
    "Handle",
    "TreeSum",
    "World",
    "deterministic",
    "generator",
    "has_triton",
    "is_out_of_memory",
    "join_world",
    "leave_world",
    "pick_device",
    "seed_for",
    "stop_with_parent",
    "told_of_slurm",
    "tree_sum",
]
