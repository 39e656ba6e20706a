"""MuonH and AdamH: steps on the sphere of matrices with the norm that a matrix began with.

By Kaiyue Wen et al. (Hyperball, 2025); results 4, 5 and 37 of modded-nanogpt's track 3, its optimizer benchmark. A step is
a share, lr, of the matrix's Frobenius norm, and the norm never changes: weight decay has nothing left to do, and the
learning rate has no unit. So no matrix may begin at zero; hidden_init="track3" is for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup.rules import Update
from speedrun_mup.core.mup.spec import ParamSpec
from speedrun_mup.core.optimizers.muon import Muon
from speedrun_mup.core.optimizers.optimizer import MatrixOptimizer, State
from speedrun_mup.core.optimizers.sharding import ParamShard

FLOOR = 1e-10  # of norms that are divided by


class NonZero(MatrixOptimizer):
    """A matrix optimizer that steers the norm of each matrix, so that none may begin at zero."""

    def _partition(self) -> list[ParamShard]:
        for name, parameter, _ in self.named_groups():
            if not parameter.is_meta and not frobenius(parameter.detach()).all():
                raise ConfigError(
                    f"{self.label} steers the norm of each matrix, and {name} begins at zero, so it would stay there; "
                    "give --hidden-init track3"
                )
        return super()._partition()


class FixedNorm(NonZero):
    """A matrix optimizer whose update is a direction; lr is the length of a step, as a share of the matrix's norm."""

    def moved(self, values: Tensor, update: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Each matrix, moved by lr of its norm, and brought back to its norm."""
        norm, direction = frobenius(values), update.to(values.dtype)
        to = values - group["lr"] * norm * direction / frobenius(direction).clamp(min=FLOOR)
        return to * (norm / frobenius(to).clamp(min=FLOOR))


def frobenius(matrices: Tensor) -> Tensor:
    """The norm of each matrix of (..., d_out, d_in), (..., 1, 1)."""
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)


class MuonH(FixedNorm, Muon):
    """Muon on the sphere: hyperparameters as Muon's, but for weight decay, which there is none of."""

    label = "MuonH"
    kind = Update.RELATIVE_SPECTRAL
    defaults = {"lr": 0.018, "momentum": 0.95, "orthogonalizer": "newton-schulz-12"}

    @classmethod
    def shape_factor(cls, spec: ParamSpec) -> float:
        """1: the direction alone counts."""
        return 1.0


class AdamH(FixedNorm):
    """Adam, whose eps is bias-corrected here as in its paper, on the sphere. For HIDDEN matrices or stacks of them only."""

    label = "AdamH"
    kind = Update.RELATIVE_ENTRYWISE
    defaults = {"lr": 0.018, "betas": (0.9, 0.95), "eps": 1e-8}
    state_names = ("exp_avg", "exp_avg_sq")

    def update(self, gradient: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Adam's direction."""
        (beta1, beta2), step, gradient = group["betas"], self.steps_taken, gradient.float()
        m = state["exp_avg"].lerp(gradient, 1 - beta1)
        v = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        direction = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
        return direction, {"exp_avg": m, "exp_avg_sq": v}
