"""What every optimizer here shares. A new one is a subclass that says its kind, its hyperparameters and one pure update.

The update works on this rank's tensors and knows of no other rank; sharding.py says which those are. A subclass of
`EntryOptimizer` updates entry by entry, one of `MatrixOptimizer` whole matrices. Add it to registry.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.core.distributed import World
from speedrun_mup.core.mup.rules import Update
from speedrun_mup.core.mup.spec import ParamSpec
from speedrun_mup.core.optimizers.cautious import cautiously_decayed
from speedrun_mup.core.optimizers.sharding import FetchSlice, Member, ParamShard, Placement, Replicated, Slice

State = Mapping[str, Tensor]


class ShardedOptimizer(torch.optim.Optimizer):
    """Each rank keeps the state of its share of the parameters and updates only that.

    `slices` and `load_slices` replace state_dict, which knows nothing of ranks: a state is a flat range of each
    parameter, so that a checkpoint written by N ranks can be read by M.
    """

    label: str  # its name in reports
    kind: Update  # by which the rule table scales its learning rate
    defaults: dict[str, Any]  # its hyperparameters, lr and weight_decay among them; a group may have its own
    state_names: tuple[str, ...]

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        world: World | None = None,
        *,
        placement: Placement = Replicated,
        **hyperparameters: Any,
    ):
        """Own the parameters of `groups`.

        Args:
            groups: of (name, parameter) pairs, as `param_groups` makes them.
            world: the ranks that share the work.
            placement: makes a shard of parameters that are updated together.
            hyperparameters: replace `defaults`.
        """
        if unknown := hyperparameters.keys() - self.defaults.keys():
            raise TypeError(
                f"{type(self).__name__} has no {', '.join(sorted(unknown))}; it has {', '.join(self.defaults)}"
            )
        super().__init__(groups, self.defaults | hyperparameters)
        self.world = world or World()
        self._placement = placement
        self.steps_taken = 0
        self.gradient_squares: list[Tensor] = []  # squared norms of this rank's share of the summed gradient
        self.shards = self._partition()

    @classmethod
    def has(cls, name: str) -> bool:
        """Whether it has this hyperparameter. Betas are beta1 and beta2."""
        return name in cls.defaults or (name in ("beta1", "beta2") and "betas" in cls.defaults)

    @classmethod
    def shape_factor(cls, spec: ParamSpec) -> float:
        """What its learning rate is multiplied by for the shape of a parameter at base width."""
        return 1.0

    @classmethod
    def options_for(cls, spec: ParamSpec) -> dict[str, Any]:
        """Further entries of a parameter's group, for an optimizer that has to know which side is which."""
        return {}

    def named_groups(self) -> Iterator[Member]:
        """Every parameter with its name and group."""
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield Member(name, parameter, group)

    def _partition(self) -> list[ParamShard]:
        """The parameters as shards."""
        raise NotImplementedError

    def _is_active(self, shard: ParamShard) -> bool:
        """Whether there is anything to do for it in this step."""
        return True

    def _new_state(self, shard: ParamShard) -> dict[str, Tensor]:
        """The state before the first update, by the names in `state_names`."""
        raise NotImplementedError

    def _advance(self, shard: ParamShard, gradient: Tensor, is_finite: Tensor | None) -> Callable[[], None]:
        """Update this rank's units and start publishing; the rest waits for the other ranks."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, is_finite: Tensor | None = None) -> None:  # type: ignore[override]
        """One update; gradients are summed over ranks here.

        is_finite: a boolean scalar on the device. If False, neither parameters nor state change, and the host does not
            wait; but the step counts in `steps_taken`, by which Adam corrects the bias of its moments.
        """
        self.steps_taken += 1
        active = [shard for shard in self.shards if self._is_active(shard)]
        collected = [shard.collect_gradients() for shard in active]
        gradients, unfinished = [], []
        for shard, (gradient, summing) in zip(active, collected, strict=True):
            summing.wait()
            gradients.append(gradient)
            unfinished.append(self._advance(shard, gradient, is_finite))
        if self.world.size > 1:  # the trainer of a world of one has the whole gradient
            self.gradient_squares = (
                [norm.float().square() for norm in torch._foreach_norm(gradients)] if gradients else []
            )
        for finish in unfinished:
            finish()

    def compile_parts(self) -> None:
        """Compile what gains by it; nothing here unless a subclass says so."""

    def state_of(self, shard: ParamShard) -> dict[str, Tensor]:
        """This rank's state for a shard, made at first use."""
        if not shard.state:
            shard.state = self._new_state(shard)
        return shard.state

    def _ranges(self) -> Iterator[tuple[str, int, int, Tensor]]:
        """("param/state", begin, end, the rows of the state that hold this range)."""
        for shard in self.shards:
            for (name, begin, end, offset), (key, tensor) in itertools.product(shard.owned(), shard.state.items()):
                size = math.prod(tensor.shape[1:])
                yield f"{name}/{key}", begin * size, end * size, tensor[offset : offset + end - begin]

    def slices(self) -> dict[str, Slice]:
        """This rank's state, keyed "param/state". Empty before the first step."""
        return {key: Slice(begin, end, rows.flatten()) for key, begin, end, rows in self._ranges()}

    @torch.no_grad()
    def load_slices(self, fetch: FetchSlice, steps_taken: int) -> None:
        """Fill this rank's state from a source that can give any range of any key; none for steps_taken == 0."""
        self.reset()
        self.steps_taken = steps_taken
        for shard in self.shards if steps_taken else ():
            self.state_of(shard)
        for key, begin, end, rows in self._ranges():
            rows.copy_(fetch(key, begin, end).view_as(rows))

    def reset(self) -> None:
        """Forget all state, as if no step had been taken."""
        self.steps_taken = 0
        for shard in self.shards:
            shard.state = {}


class EntryOptimizer(ShardedOptimizer):
    """An update of each entry by itself: for parameters of any shape, shared out by flat ranges.

    State has the type of the parameter.
    """

    def update(
        self, values: Tensor, gradient: Tensor, state: State, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """New values and state of this rank's entries (n,); changes none of its arguments."""
        raise NotImplementedError

    def update_in_place(
        self, values: Tensor, gradient: Tensor, state: State, group: Mapping[str, Any], is_finite: Tensor | None
    ) -> None:
        """`update`, written where `is_finite`."""
        new_values, new_state = self.update(values, gradient, state, group)
        write(values, new_values, is_finite)
        for name, stored in state.items():
            write(stored, new_state[name], is_finite)

    def _partition(self) -> list[ParamShard]:
        return [self._placement([member], (), self.world) for member in self.named_groups()]

    def _is_active(self, shard: ParamShard) -> bool:
        """A parameter without gradient stays as it is."""
        return shard.members[0].parameter.grad is not None

    def _new_state(self, shard: ParamShard) -> dict[str, Tensor]:
        parameter = shard.members[0].parameter
        return {name: parameter.new_zeros(shard.count) for name in self.state_names}

    def _advance(self, shard: ParamShard, gradient: Tensor, is_finite: Tensor | None) -> Callable[[], None]:
        values = shard.values()
        self.update_in_place(values, gradient, self.state_of(shard), shard.members[0].group, is_finite)
        return shard.publish_values(values).wait


OF_EACH_PARAMETER = {"params", "param_names", "lr", "initial_lr", "weight_decay", "initial_weight_decay"}


class MatrixOptimizer(ShardedOptimizer):
    """An update of whole matrices (d_out, d_in), or stacks of them (n, d_out, d_in), with decoupled weight decay.

    Matrices of one shape and with the same hyperparameters, but for learning rate and decay, are updated as one batch.
    State is float32.
    """

    def update(self, gradient: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """What -lr is multiplied by, (N, d_out, d_in), and the new state; changes none of its arguments."""
        raise NotImplementedError

    def _partition(self) -> list[ParamShard]:
        batches: dict[Any, list[Member]] = {}
        for member in self.named_groups():
            shape = tuple(member.parameter.shape)
            if len(shape) not in (2, 3):
                raise ValueError(f"{self.label} takes matrices or stacks of them; {member.name} has shape {shape}")
            shared = tuple(sorted((key, value) for key, value in member.group.items() if key not in OF_EACH_PARAMETER))
            batches.setdefault((shape[-2:], shared), []).append(member)
        return [self._placement(members, shape, self.world) for (shape, _), members in batches.items()]

    def _state_shape(self, name: str, shard: ParamShard) -> tuple[int, ...]:
        """Of the state `name` of one matrix."""
        return shard.unit

    def _new_state(self, shard: ParamShard) -> dict[str, Tensor]:
        device = shard.members[0].parameter.device
        shapes = {name: (shard.count, *self._state_shape(name, shard)) for name in self.state_names}
        return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}

    def _advance(self, shard: ParamShard, gradient: Tensor, is_finite: Tensor | None) -> Callable[[], None]:
        state = self.state_of(shard)
        update, new_state = self._update_alike(gradient, state, shard.members[0].group)
        for name, stored in state.items():
            write(stored, new_state[name], is_finite)
        updates, gathering = shard.publish_updates(update)

        def finish() -> None:
            gathering.wait()
            for stored, member, update in zip(shard.stored(), shard.members, updates, strict=True):
                write(stored, self.moved(stored, update, member.group), is_finite)

        return finish

    def moved(self, values: Tensor, update: Tensor, group: Mapping[str, Any]) -> Tensor:
        """A parameter (d_out, d_in) or (n, d_out, d_in) after the step, from what `update` returned for it."""
        lr, weight_decay = group["lr"], group["weight_decay"]
        if weight_decay and group.get("cautious"):
            values = cautiously_decayed(values, lr * weight_decay, update * values >= 0)
        elif weight_decay:
            values = values * (1 - lr * weight_decay)
        return values.add(update, alpha=-lr)

    def _update_alike(
        self, gradient: Tensor, state: State, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`update`; in a strict world one by one: a batched product may take another path when a rank holds fewer."""
        if not self.world.strict or len(gradient) < 2:
            return self.update(gradient, state, group)
        each = [
            self.update(gradient[i : i + 1], {name: tensor[i : i + 1] for name, tensor in state.items()}, group)
            for i in range(len(gradient))
        ]
        return (
            torch.cat([update for update, _ in each]),
            {name: torch.cat([new_state[name] for _, new_state in each]) for name in state},
        )


def write(stored: Tensor, new: Tensor, is_finite: Tensor | None) -> None:
    """Store `new` where `is_finite`; None means yes."""
    stored.copy_(new if is_finite is None else torch.where(is_finite, new, stored))
