"""Adam, with decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.core.mup.rules import Update
from speedrun_mup.core.optimizers.cautious import cautiously_decayed
from speedrun_mup.core.optimizers.optimizer import EntryOptimizer, State

SMALL = 1024  # entries: torch keeps the code of 8 sizes of a function, and scalars come in many


class DistAdam(EntryOptimizer):
    """Adam with decoupled weight decay (lr * weight_decay), any parameter shape, state sharded by flat ranges.

    As in the record, eps stays outside the bias correction: p -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps).
    Moments have the parameter's dtype; arithmetic is float32. cautious: decay is, see cautious.py.
    """

    label = "Adam"
    kind = Update.ENTRYWISE
    defaults = {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0, "cautious": False}
    state_names = ("exp_avg", "exp_avg_sq")

    formula: Callable[..., None] | None = None

    def compile_parts(self) -> None:
        """Compile the update of each type and size, but for SMALL ones, into one pass. Changing rates compile nothing."""
        self.formula = torch.compile(adam_formula, dynamic=False)

    def _scalars(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """What weight decay leaves of a parameter, and the learning rate with the bias corrections of both moments."""
        betas, lr, step = group["betas"], group["lr"], self.steps_taken
        return 1 - lr * group["weight_decay"], lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)

    def update(
        self, values: Tensor, gradient: Tensor, state: State, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of `adam_update`."""
        m, v = state["exp_avg"], state["exp_avg_sq"]
        p, m, v = adam_update(
            values, gradient, m, v, *self._scalars(group), group["betas"], group["eps"], group["cautious"]
        )
        return p, {"exp_avg": m, "exp_avg_sq": v}

    def update_in_place(
        self, values: Tensor, gradient: Tensor, state: State, group: Mapping[str, Any], is_finite: Tensor | None
    ) -> None:
        """In one compiled pass, where there is one."""
        if self.formula is None or values.numel() <= SMALL:
            super().update_in_place(values, gradient, state, group, is_finite)
            return
        is_finite = torch.ones((), dtype=torch.bool, device=values.device) if is_finite is None else is_finite
        scalars = [torch.full_like(is_finite, value, dtype=torch.float32) for value in self._scalars(group)]
        self.formula(
            values, gradient, *state.values(), *scalars, group["betas"], group["eps"], is_finite, group["cautious"]
        )


def adam_update(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    decay: float,
    step_size: float,
    betas: tuple[float, float],
    eps: float,
    cautious: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One Adam step on flat tensors, in float32: the new p, exp_avg and exp_avg_sq.

    Args:
        p, g, exp_avg, exp_avg_sq: parameter, gradient and moments, (n,); they stay as they are.
        decay: what weight decay leaves of p.
        step_size: the learning rate with the bias corrections of both moments.
        betas, eps: Adam's.
        cautious: decay only those entries of p that the step moves towards zero.
    """
    g = g.float()
    m = exp_avg.float().lerp(g, 1 - betas[0])
    v = (exp_avg_sq.float() * betas[1]).addcmul_(g, g, value=1 - betas[1])
    w = p.float()
    if cautious:
        w = cautiously_decayed(w, 1 - decay, m * w > 0)
    elif decay != 1:
        w = w * decay
    return torch.addcdiv(w, m, v.sqrt().add_(eps), value=-step_size), m, v


def adam_formula(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    decay: Tensor,
    step_size: Tensor,
    betas: tuple[float, float],
    eps: float,
    is_finite: Tensor,
    cautious: bool = False,
) -> None:
    """`adam_update` for a compiler, in place where `is_finite`, rounded once each.

    What changes from step to step is a tensor, so that it compiles once.
    """
    g = g.float()
    m = exp_avg.float().lerp(g, 1 - betas[0])
    v = exp_avg_sq.float() * betas[1] + g * g * (1 - betas[1])
    w = p.float()
    w = cautiously_decayed(w, 1 - decay, m * w > 0) if cautious else w * decay
    w = w - step_size * m / (v.sqrt() + eps)
    for stored, new in ((exp_avg, m), (exp_avg_sq, v), (p, w)):
        stored.copy_(torch.where(is_finite, new, stored))
