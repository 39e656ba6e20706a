"""Adam, its state sharded over ranks by flat ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.core.distributed import World
from speedrun_mup.core.optimizers.sharding import FetchSlice, ShardedOptimizer, Slice, padded, where


class DistAdam(ShardedOptimizer):
    """Adam with decoupled weight decay (lr * weight_decay), any parameter shape, state sharded by flat ranges.

    As in the record, eps stays outside the bias correction: p -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps).
    Moments have the parameter's dtype; arithmetic is float32.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        world: World | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.8, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ):
        super().__init__(groups, world or World(), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.formula: Callable[..., None] | None = None

    def compile_parts(self) -> None:
        """Compile the update of each type and shape into one pass over memory. Changing learning rates compile nothing."""
        self.formula = torch.compile(adam_formula, dynamic=False)

    def _range(self, parameter: Tensor) -> tuple[int, int, int]:
        """This rank's [begin, end) of the flat parameter, and the length of a share with padding."""
        share = -(-parameter.numel() // self.world.size)
        begin = min(self.world.rank * share, parameter.numel())
        return begin, min(begin + share, parameter.numel()), share

    def _moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        if not state:
            begin, end, _ = self._range(parameter)
            state["exp_avg"] = parameter.new_zeros(end - begin)
            state["exp_avg_sq"] = parameter.new_zeros(end - begin)
        return state["exp_avg"], state["exp_avg_sq"]

    @torch.no_grad()
    def step(self, good: Tensor | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        self.steps_taken += 1
        active, reductions = [], []
        for _, parameter, group in self.named_groups():
            if parameter.grad is not None:
                full = padded(parameter.grad.flatten(), self._range(parameter)[2] * self.world.size)
                active.append((parameter, group))
                reductions.append(self.world.reduce_scatter(full))
        gathers, parts = [], []
        for (parameter, group), (gradient, reduction) in zip(active, reductions, strict=True):
            begin, end, share = self._range(parameter)
            reduction.wait()
            parts.append(gradient[: end - begin])
            mine = parameter.data.view(-1)[begin:end]
            self._update(mine, gradient[: end - begin], *self._moments(parameter), group, good)
            gathers.append(self.world.all_gather(padded(mine, share)))
        self.gradient_squares = self._squares(parts)
        for (parameter, _), (full, gather) in zip(active, gathers, strict=True):
            gather.wait()
            if self.world.size > 1:
                parameter.data.view(-1).copy_(full[: parameter.numel()])

    def _update(
        self, p: Tensor, g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, group: Mapping[str, Any], good: Tensor | None
    ) -> None:
        betas, eps, lr, step = group["betas"], group["eps"], group["lr"], self.steps_taken
        kept, step_size = 1 - lr * group["weight_decay"], lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
        if self.formula is None:
            adam_update(p, g, exp_avg, exp_avg_sq, kept, step_size, betas, eps, good)
        else:
            good = torch.ones((), dtype=torch.bool, device=p.device) if good is None else good
            scalars = [torch.full_like(good, value, dtype=torch.float32) for value in (kept, step_size)]
            self.formula(p, g, exp_avg, exp_avg_sq, *scalars, betas, eps, good)

    def slices(self) -> dict[str, Slice]:
        """This rank's moments, keyed "param/exp_avg" and "param/exp_avg_sq"."""
        found = {}
        for name, parameter, _ in self.named_groups():
            begin, end, _ = self._range(parameter)
            for key, tensor in self.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = Slice(begin, end, tensor)
        return found

    @torch.no_grad()
    def load_slices(self, fetch: FetchSlice, steps_taken: int) -> None:
        """Fill this rank's moments; with steps_taken == 0 there is nothing to fetch."""
        self.reset()
        self.steps_taken = steps_taken
        for name, parameter, _ in self.named_groups() if steps_taken else ():
            begin, end, _ = self._range(parameter)
            for key, tensor in zip(("exp_avg", "exp_avg_sq"), self._moments(parameter), strict=True):
                tensor.copy_(fetch(f"{name}/{key}", begin, end))

    def reset(self) -> None:
        """Forget all moments."""
        self.state.clear()
        self.steps_taken = 0


def adam_update(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    kept: float,
    step_size: float,
    betas: tuple[float, float],
    eps: float,
    good: Tensor | None = None,
) -> None:
    """One Adam step on flat tensors, in place, where `good`. float32 inside, rounded once each.

    kept: what weight decay leaves of p. step_size: the learning rate with the bias corrections of both moments.
    """
    m, v, w = (stored.to(torch.float32, copy=good is not None) for stored in (exp_avg, exp_avg_sq, p))
    g = g.float()
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    if kept != 1:
        w.mul_(kept)
    w.addcdiv_(m, v.sqrt().add_(eps), value=-step_size)
    for stored, new in ((exp_avg, m), (exp_avg_sq, v), (p, w)):
        stored.copy_(where(good, new, stored))


def adam_formula(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    kept: Tensor,
    step_size: Tensor,
    betas: tuple[float, float],
    eps: float,
    good: Tensor,
) -> None:
    """`adam_update` for a compiler. What changes from step to step is a tensor, so that it compiles once."""
    g = g.float()
    m = exp_avg.float().lerp(g, 1 - betas[0])
    v = exp_avg_sq.float() * betas[1] + g * g * (1 - betas[1])
    w = p.float() * kept - step_size * m / (v.sqrt() + eps)
    for stored, new in ((exp_avg, m), (exp_avg_sq, v), (p, w)):
        stored.copy_(torch.where(good, new, stored))
