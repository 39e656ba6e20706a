"""Muon by Keller Jordan et al. (kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from speedrun_mup.core.mup.rules import Update
from speedrun_mup.core.mup.spec import ParamSpec
from speedrun_mup.core.optimizers.optimizer import MatrixOptimizer, State
from speedrun_mup.core.optimizers.registry import ORTHOGONALIZERS


class Muon(MatrixOptimizer):
    """Momentum, orthogonalized. For HIDDEN matrices (d_out, d_in) or stacks (n, d_out, d_in) only.

    lr: length of one update in spectral norm; the shape factor is in it already (see `param_groups`). Momentum is the
    exponential-average form with a Nesterov look-ahead. orthogonalizer: a name in ORTHOGONALIZERS, or a function
    (N, d_out, d_in) -> the same shape; it gets float32 on CPU, bfloat16 on CUDA. cautious: decay is, see cautious.py.
    """

    label = "Muon"
    kind = Update.SPECTRAL
    defaults = {"lr": 0.05, "momentum": 0.95, "weight_decay": 0.0, "orthogonalizer": "newton-schulz", "cautious": False}
    state_names: tuple[str, ...] = ("momentum_buffer",)

    @classmethod
    def shape_factor(cls, spec: ParamSpec) -> float:
        """sqrt(max(1, d_out / d_in))."""
        return math.sqrt(max(1.0, spec.base_fan_out / spec.base_fan_in))

    def update(self, gradient: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The orthogonalized momentum."""
        method = group["orthogonalizer"]
        orthogonalizer = ORTHOGONALIZERS[method] if isinstance(method, str) else method
        update, buffer = muon_update(gradient, state["momentum_buffer"], group["momentum"], orthogonalizer)
        return update, {"momentum_buffer": buffer}


def muon_update(
    gradient: Tensor, momentum_buffer: Tensor, momentum: float, orthogonalizer: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The update (N, d_out, d_in) and the new momentum buffer, which is float32."""
    gradient = gradient.float()
    buffer = momentum_buffer.lerp(gradient, 1 - momentum)
    nesterov = gradient.lerp(buffer, momentum)
    return orthogonalizer(nesterov.bfloat16() if nesterov.is_cuda else nesterov), buffer
