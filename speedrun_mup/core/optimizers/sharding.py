"""Which rank keeps the optimizer state of what: flat ranges of parameters, so that any number of ranks can read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.core.distributed import World


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


def where(good: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` where `good`, else `old`; no `good` means yes."""
    return new if good is None else torch.where(good, new, old)


def padded(flat: Tensor, length: int) -> Tensor:
    """`flat` (n, ...) with zero rows appended up to `length`; itself where it is long enough."""
    if len(flat) == length:
        return flat
    return torch.cat([flat, flat.new_zeros(length - len(flat), *flat.shape[1:])])
