"""Placement: who owns what of the parameters that an optimizer updates, and how ranks exchange gradients and updates.

Shapes: a parameter is a batch of units, which are single entries, shape (), or whole matrices, (d_out, d_in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from speedrun_mup.core.distributed import Handle, World


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


class Member(NamedTuple):
    """A parameter, its name, and its parameter group."""

    name: str
    parameter: Tensor
    group: dict[str, Any]


class Owned(NamedTuple):
    """The units [begin, end) of a parameter that this rank updates, and where in its batch they start."""

    name: str
    begin: int
    end: int
    offset: int


class ParamShard(Protocol):
    """Parameters that are updated as one batch of units, of which this rank updates `count`.

    An optimizer knows placement by these methods alone. To add one, such as FSDP2's, write a class like
    `Replicated`.
    """

    unit: tuple[int, ...]
    members: Sequence[Member]
    count: int
    state: dict[str, Tensor]  # of this rank's units, (count, ...); empty before the first update

    def owned(self) -> Iterator[Owned]:
        """What this rank updates, parameter by parameter."""

    def collect_gradients(self) -> tuple[Tensor, Handle]:
        """Start summing gradients over ranks; those of this rank's units, (count, *unit), once the handle is done."""

    def values(self) -> Tensor:
        """This rank's units of the one parameter, (count, *unit), to be changed in place and published."""

    def publish_values(self, values: Tensor) -> Handle:
        """Start giving the changed `values` to the ranks that store them; the parameter is new once the handle is done."""

    def stored(self) -> list[Tensor]:
        """What this rank stores of each parameter, to be changed in place."""

    def publish_updates(self, updates: Tensor) -> tuple[list[Tensor], Handle]:
        """Start handing the updates of this rank's units to where the parameters are: one for each of `stored`."""


Placement = Callable[[Sequence[Member], tuple[int, ...], World], ParamShard]  # of (members, unit, world)


class Replicated:
    """Every rank stores whole parameters; each updates a run of their units and keeps its state (ZeRO, stage 1).

    Gradients are reduce-scattered, new values or updates come back by all-gather; a world of one skips both. Sharding
    Muon by whole matrices follows modded-nanogpt.
    """

    def __init__(self, members: Sequence[Member], unit: tuple[int, ...], world: World):
        self.members = members
        self.unit = unit
        self.world = world
        self.state: dict[str, Tensor] = {}
        self.counts = [member.parameter.numel() // math.prod(unit) for member in members]
        total = sum(self.counts)
        self.share = -(-total // world.size)  # units of a rank, with padding
        self.first = min(world.rank * self.share, total)
        self.count = min(self.share, total - self.first)

    def owned(self) -> Iterator[Owned]:
        """What this rank updates, parameter by parameter."""
        start = 0
        for member, count in zip(self.members, self.counts, strict=True):
            begin, end = max(start, self.first), min(start + count, self.first + self.count)
            if begin < end:
                yield Owned(member.name, begin - start, end - start, begin - self.first)
            start += count

    def collect_gradients(self) -> tuple[Tensor, Handle]:
        """Start a reduce-scatter. A parameter without gradient has a gradient of zero."""
        gradients = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1, *self.unit)
            for _, parameter, _ in self.members
        ]
        batch = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
        part, handle = self.world.reduce_scatter(_padded(batch, self.share * self.world.size))
        return part[: self.count], handle

    def values(self) -> Tensor:
        """A view of this rank's units of the parameter."""
        (member,) = self.members
        return member.parameter.data.view(-1, *self.unit)[self.first : self.first + self.count]

    def publish_values(self, values: Tensor) -> Handle:
        """Start an all-gather of the parameter."""
        if self.world.size == 1:
            return Handle()
        ((_, parameter, _),) = self.members
        full, gathering = self.world.all_gather(_padded(values, self.share))
        return Handle(gathering.wait, lambda: parameter.data.view(-1, *self.unit).copy_(full[: self.counts[0]]))

    def stored(self) -> list[Tensor]:
        """The whole parameters."""
        return [parameter for _, parameter, _ in self.members]

    def publish_updates(self, updates: Tensor) -> tuple[list[Tensor], Handle]:
        """Start an all-gather of the updates, which may be narrower than the parameters."""
        full, gathering = self.world.all_gather(_padded(updates, self.share))
        parts = full[: sum(self.counts)].split(self.counts)
        return [part.view_as(stored) for part, stored in zip(parts, self.stored(), strict=True)], gathering


def _padded(batch: Tensor, length: int) -> Tensor:
    """`batch` (n, ...) with zeros appended up to `length`; itself where it is long enough."""
    if len(batch) == length:
        return batch
    return torch.cat([batch, batch.new_zeros(length - len(batch), *batch.shape[1:])])
