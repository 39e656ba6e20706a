"""Muon by Keller Jordan et al. (kellerjordan.github.io/posts/muon), sharded over ranks by whole matrices.

Sharding it this way follows modded-nanogpt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.core.distributed import Handle, World
from speedrun_mup.core.optimizers.orthogonalization import newton_schulz
from speedrun_mup.core.optimizers.sharding import FetchSlice, ShardedOptimizer, Slice, padded, where


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
        return self.world.reduce_scatter(padded(torch.cat(rows), self.share * self.world.size))

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
            momentum.copy_(where(good, momentum.lerp(gradient.float(), 1 - mu), momentum))
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
                parameter.copy_(where(good, new, parameter))

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
