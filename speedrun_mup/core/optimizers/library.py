"""Every name of `core.optimizers`."""

from speedrun_mup.core.optimizers.adam import DistAdam, adam_formula, adam_update
from speedrun_mup.core.optimizers.groups import GroupHyperparams, param_groups
from speedrun_mup.core.optimizers.muon import Muon, muon_update
from speedrun_mup.core.optimizers.optimizer import EntryOptimizer, MatrixOptimizer, ShardedOptimizer
from speedrun_mup.core.optimizers.orthogonalization import newton_schulz, newton_schulz_12, orthogonalize
from speedrun_mup.core.optimizers.registry import OPTIMIZERS, ORTHOGONALIZERS
from speedrun_mup.core.optimizers.sharding import FetchSlice, Slice

Tuned = GroupHyperparams  # its first name

__all__ = [
    "OPTIMIZERS",
    "ORTHOGONALIZERS",
    "DistAdam",
    "EntryOptimizer",
    "FetchSlice",
    "GroupHyperparams",
    "MatrixOptimizer",
    "Muon",
    "ShardedOptimizer",
    "Slice",
    "Tuned",
    "adam_formula",
    "adam_update",
    "muon_update",
    "newton_schulz",
    "newton_schulz_12",
    "orthogonalize",
    "param_groups",
]
