"""The optimizers and the ways to orthogonalize, by name. A new one is its own file and a line here. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from speedrun_mup.core.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from speedrun_mup.core.optimizers.optimizer import ShardedOptimizer

_HERE = "speedrun_mup.core.optimizers"

OPTIMIZERS: Registry[type[ShardedOptimizer]] = Registry(
    "optimizer",
    {
        "muon": f"{_HERE}.muon:Muon",
        "adam": f"{_HERE}.adam:DistAdam",
        "normuon": f"{_HERE}.normuon:NorMuon",
        "muonh": f"{_HERE}.hyperball:MuonH",
        "adamh": f"{_HERE}.hyperball:AdamH",
        "soap-muon": f"{_HERE}.soap:SoapMuon",
    },
)

ORTHOGONALIZERS: Registry[Callable[[Tensor], Tensor]] = Registry(  # (N, d_out, d_in) -> the same shape
    "orthogonalizer",
    {
        "newton-schulz": f"{_HERE}.orthogonalization:newton_schulz",
        "newton-schulz-12": f"{_HERE}.orthogonalization:newton_schulz_12",
        "polar-express": f"{_HERE}.polar_express:polar_express",
    },
)
