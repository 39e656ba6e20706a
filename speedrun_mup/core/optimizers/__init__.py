"""DistAdam and Muon: each rank keeps the state of its share of the parameters and updates only that.

Gradients are summed over ranks by reduce-scatter, the updated share (Adam) or its update (Muon) comes back by
all-gather; a world of one skips both. A rank's state is a flat range of each parameter (`slices`), so that a checkpoint
written by N ranks can be read by M.
"""

from speedrun_mup.core.optimizers.adam import DistAdam, adam_formula, adam_update
from speedrun_mup.core.optimizers.groups import GroupHyperparams, param_groups
from speedrun_mup.core.optimizers.muon import Muon
from speedrun_mup.core.optimizers.orthogonalization import newton_schulz, orthogonalize
from speedrun_mup.core.optimizers.sharding import FetchSlice, ShardedOptimizer, Slice

Tuned = GroupHyperparams  # its first name

__all__ = [
    "DistAdam",
    "FetchSlice",
    "GroupHyperparams",
    "Muon",
    "ShardedOptimizer",
    "Slice",
    "Tuned",
    "adam_formula",
    "adam_update",
    "newton_schulz",
    "orthogonalize",
    "param_groups",
]
