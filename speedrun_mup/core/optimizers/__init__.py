"""DistAdam and Muon: each rank keeps the state of its share of the parameters and updates only that.

Gradients are summed over ranks by reduce-scatter, the updated share (Adam) or its update (Muon) comes back by
all-gather; a world of one skips both. A rank's state is a flat range of each parameter (`slices`), so that a checkpoint
written by N ranks can be read by M.

Muon is by Keller Jordan et al. (kellerjordan.github.io/posts/muon); sharding it this way follows modded-nanogpt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.utils import Handle, World, has_triton

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic: singular values end in about [0.7, 1.2]
NEWTON_SCHULZ_STEPS = 5
SMALLEST_SYMMETRIC = 512  # rows: from four tiles of 128 on, computing the lower half saves a third of the tiles or more


def newton_schulz(matrices: Tensor) -> Tensor:
    """Roughly orthogonalize each of (N, d_out, d_in): same singular vectors, singular values near 1. Zero stays zero."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    pays = symmetric_products_pay(x)
    for _ in range(NEWTON_SCHULZ_STEPS):
        if pays:
            from speedrun_mup.core.kernels.triton import symmetric_product

            gram = symmetric_product(x)
            polynomial = symmetric_product(gram, gram, alpha=c, beta=b)
        else:
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def symmetric_products_pay(x: Tensor) -> bool:
    """Whether computing half of x x^T (N, m, n) and mirroring it is worth a kernel of our own, where there is Triton."""
    return x.dtype is torch.bfloat16 and x.size(-2) >= SMALLEST_SYMMETRIC and has_triton(x.device)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The reference of `newton_schulz`: set every singular value of (N, d_out, d_in) to exactly 1, by SVD."""
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    return u @ vh


@dataclass(frozen=True)
class Tuned:
    """What was tuned at base width for one group of parameters. optimizer: "adam" or "muon"."""

    optimizer: str
    lr: float
    weight_decay: float = 0.0
    eps: float = 1e-10


def param_groups(
    model: nn.Module, table: mup.Parametrization, tuned: Mapping[str, Tuned]
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


@dataclass(frozen=True)
class Slice:
    """A flat range [begin, end) of one parameter's state, as one rank holds it. tensor: (end - begin,)."""

    begin: int
    end: int
    tensor: Tensor

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end or self.tensor.shape != (self.end - self.begin,):
            raise ValueError(f"range [{self.begin}, {self.end}) does not fit a tensor {tuple(self.tensor.shape)}")


FetchSlice = Callable[[str, int, int], Tensor]  # ("param/state", begin, end) -> (end - begin,)


class ShardedOptimizer(torch.optim.Optimizer):
    """What DistAdam and Muon share: groups of named parameters, a step count, and state as flat slices.

    `slices` and `load_slices` replace state_dict, which knows nothing of ranks.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], world: World, defaults: dict[str, Any]):
        super().__init__(groups, defaults)
        self.world = world
        self.steps_taken = 0
        self.gradient_squares: list[Tensor] = []  # squared norms of this rank's share of the summed gradient

    def _squares(self, parts: list[Tensor]) -> list[Tensor]:
        """The squared norms of parts of the summed gradient; nothing for a world of one, whose trainer has all of it."""
        return [norm.float().square() for norm in torch._foreach_norm(parts)] if self.world.size > 1 and parts else []

    def named_groups(self) -> Iterable[tuple[str, Tensor, dict[str, Any]]]:
        """(name, parameter, group) of every parameter."""
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield name, parameter, group

    def step(self, good: Tensor | None = None) -> None:  # type: ignore[override]
        """One update; gradients are summed over ranks here.

        good: a boolean scalar on the device. If False, neither parameters nor state change, and no host had to wait;
            but the step counts in `steps_taken`, by which Adam corrects the bias of its moments.
        """
        raise NotImplementedError

    def compile_parts(self) -> None:
        """Compile what gains by it; nothing here unless a subclass says so."""

    def slices(self) -> dict[str, Slice]:
        """This rank's state, keyed "param/state". Empty before the first step."""
        raise NotImplementedError

    def load_slices(self, fetch: FetchSlice, steps_taken: int) -> None:
        """Fill this rank's state from a source that can give any range of any key."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all state, as if no step had been taken."""
        raise NotImplementedError


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
                padded = _padded(parameter.grad.flatten(), self._range(parameter)[2] * self.world.size)
                active.append((parameter, group))
                reductions.append(self.world.reduce_scatter(padded))
        gathers, parts = [], []
        for (parameter, group), (gradient, reduction) in zip(active, reductions, strict=True):
            begin, end, share = self._range(parameter)
            reduction.wait()
            parts.append(gradient[: end - begin])
            mine = parameter.data.view(-1)[begin:end]
            self._update(mine, gradient[: end - begin], *self._moments(parameter), group, good)
            gathers.append(self.world.all_gather(_padded(mine, share)))
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
        stored.copy_(_where(good, new, stored))


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


def _where(good: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if good is None else torch.where(good, new, old)


def _padded(flat: Tensor, length: int) -> Tensor:
    """`flat` (n, ...) with zero rows appended up to `length`; itself where it is long enough."""
    if len(flat) == length:
        return flat
    return torch.cat([flat, flat.new_zeros(length - len(flat), *flat.shape[1:])])


class _Stack:
    """All matrices of one shape, as one (N, d_out, d_in) batch; this rank owns `mine` = [begin, end) of them."""

    def __init__(self, shape: tuple[int, int], world: World):
        self.shape = shape
        self.world = world
        self.owners: list[tuple[str, Tensor, dict[str, Any]]] = []  # parameters in order; each brings >= 1 matrices
        self.momentum: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """How many matrices each parameter brings."""
        return [parameter.numel() // math.prod(self.shape) for _, parameter, _ in self.owners]

    @property
    def share(self) -> int:
        """Matrices per rank, zero matrices as padding included."""
        return -(-sum(self.counts) // self.world.size)

    def momentum_buffer(self) -> Tensor:
        """(share, d_out, d_in) float32, zeros at first."""
        if self.momentum is None:
            device = self.owners[0][1].device
            self.momentum = torch.zeros(self.share, *self.shape, dtype=torch.float32, device=device)
        return self.momentum

    def reduce_gradients(self) -> tuple[Tensor, Handle]:
        """Start summing over ranks; leaves (share, d_out, d_in)."""
        rows = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).view(-1, *self.shape)
            for _, parameter, _ in self.owners
        ]
        return self.world.reduce_scatter(_padded(torch.cat(rows), self.share * self.world.size))

    def owned(self) -> Iterable[tuple[str, int, int, Tensor]]:
        """(name, begin, end, momentum rows) of each parameter that this rank holds any matrix of; a flat range."""
        size, first = math.prod(self.shape), self.world.rank * self.share
        start = 0
        for (name, _, _), count in zip(self.owners, self.counts, strict=True):
            lo, hi = max(start, first), min(start + count, first + self.share)
            if lo < hi:
                rows = self.momentum_buffer()[lo - first : hi - first]
                yield name, (lo - start) * size, (hi - start) * size, rows
            start += count


class Muon(ShardedOptimizer):
    """Momentum, orthogonalized. For HIDDEN matrices (d_out, d_in) or stacks (n, d_out, d_in) only.

    lr: length of one update in spectral norm; the shape factor is in it already (see `param_groups`). Momentum is the
    exponential-average form with a Nesterov look-ahead. Matrices of one shape are orthogonalized as one batch, shared
    out over ranks whole. orthogonalizer: (N, d_out, d_in) -> the same shape; float32 on CPU, bfloat16 on CUDA.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        world: World | None = None,
        lr: float = 0.05,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        orthogonalizer: Callable[[Tensor], Tensor] = newton_schulz,
    ):
        super().__init__(groups, world or World(), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.orthogonalizer = orthogonalizer
        stacks: dict[tuple[int, int], _Stack] = {}
        for name, parameter, group in self.named_groups():
            if parameter.ndim not in (2, 3):
                raise ValueError(f"Muon takes matrices or stacks of them; {name} has shape {tuple(parameter.shape)}")
            shape = (parameter.size(-2), parameter.size(-1))
            stacks.setdefault(shape, _Stack(shape, self.world)).owners.append((name, parameter, group))
        self._stacks = list(stacks.values())

    @torch.no_grad()
    def step(self, good: Tensor | None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        self.steps_taken += 1
        reductions = [stack.reduce_gradients() for stack in self._stacks]
        gathers, squares = [], []
        for stack, (gradient, reduction) in zip(self._stacks, reductions, strict=True):
            mu = stack.owners[0][2]["momentum"]
            reduction.wait()
            squares += self._squares([gradient])  # before it is changed in place
            momentum = stack.momentum_buffer()
            momentum.copy_(_where(good, momentum.lerp(gradient.float(), 1 - mu), momentum))
            ahead = gradient.float().lerp_(momentum, mu)
            update = self._orthogonalized(ahead.bfloat16() if ahead.is_cuda else ahead)
            gathers.append(self.world.all_gather(update))
        self.gradient_squares = squares
        for stack, (updates, gather) in zip(self._stacks, gathers, strict=True):
            gather.wait()
            per_owner = updates[: sum(stack.counts)].split(stack.counts)
            for (_, parameter, group), update in zip(stack.owners, per_owner, strict=True):
                kept = parameter * (1 - group["lr"] * group["weight_decay"]) if group["weight_decay"] else parameter
                new = kept.add(update.view_as(parameter), alpha=-group["lr"])
                parameter.copy_(_where(good, new, parameter))

    def _orthogonalized(self, matrices: Tensor) -> Tensor:
        """In a strict world one by one: a batched product may take another path when a rank holds fewer of them."""
        return torch.cat(
            [self.orthogonalizer(each) for each in matrices.split(1 if self.world.strict else len(matrices))]
        )

    def slices(self) -> dict[str, Slice]:
        """This rank's momentum, keyed "param/momentum_buffer"."""
        if not self.steps_taken:
            return {}
        owned = (entry for stack in self._stacks for entry in stack.owned())
        return {f"{name}/momentum_buffer": Slice(begin, end, rows.flatten()) for name, begin, end, rows in owned}

    @torch.no_grad()
    def load_slices(self, fetch: FetchSlice, steps_taken: int) -> None:
        """Fill this rank's momentum; with steps_taken == 0 there is nothing to fetch."""
        self.reset()
        self.steps_taken = steps_taken
        for stack in self._stacks if steps_taken else ():
            for name, begin, end, rows in stack.owned():
                rows.copy_(fetch(f"{name}/momentum_buffer", begin, end).view_as(rows))

    def reset(self) -> None:
        """Forget all momentum."""
        self.steps_taken = 0
        for stack in self._stacks:
            stack.momentum = None
