"""Several optimizers as one, for what takes one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from speedrun_mup.core.errors import ConfigError


class Combined(Optimizer):
    """Several optimizers as one, for trainers that take one: Hugging Face's Trainer, Lightning's automatic mode.

    Its groups are theirs, so a scheduler sees them all, gradients are clipped and unscaled in all; its state is theirs, and
    state_dict() is laid out as that of any optimizer of torch's.
    """

    def __init__(self, *optimizers: Optimizer):
        self.optimizers: tuple[Optimizer, ...] = ()
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = optimizers

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Tensor, Any]:
        """{parameter: its state} of all of them."""
        return _States(self.optimizers)

    @state.setter
    def state(self, value: Any) -> None:
        """What torch does at the start, with nothing in it."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each; the closure is called once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: only you know which of the optimizers should own it."""
        if self.optimizers:
            raise ConfigError("add the group to one of the optimizers, then combine them again")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """{"state", "param_groups"}: parameters are numbered through all of them."""
        whole: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0
        for optimizer in self.optimizers:
            own = optimizer.state_dict()
            whole["state"] |= {first + number: values for number, values in own["state"].items()}
            for group in own["param_groups"]:
                whole["param_groups"].append(group | {"params": [first + number for number in group["params"]]})
            first += sum(len(group["params"]) for group in own["param_groups"])
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of state_dict. Raises ConfigError for the state of other optimizers."""
        for optimizer, state in zip(self.optimizers, self._parts(state_dict)):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _parts(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """A state dict for each of the optimizers."""
        if isinstance(earlier := state_dict.get("optimizers"), list):  # what the first edition saved
            parts = earlier
        else:
            groups, parts = iter(state_dict.get("param_groups", ())), []
            for optimizer in self.optimizers:
                own = list(itertools.islice(groups, len(optimizer.param_groups)))
                members = {number for group in own for number in group["params"]}
                state = {number: values for number, values in state_dict["state"].items() if number in members}
                parts.append({"state": state, "param_groups": own})
            parts += [{"param_groups": [group]} for group in groups]
        if [len(part["param_groups"]) for part in parts] != [len(o.param_groups) for o in self.optimizers]:
            raise ConfigError(f"this is not the state of {len(self.optimizers)} combined optimizers")
        return parts

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in super().__getstate__().items() if key != "state"}
        return kept | {"optimizers": self.optimizers}


class _States(MutableMapping[Tensor, Any]):
    """What several optimizers keep of their parameters, as one mapping that can be written to."""

    def __init__(self, optimizers: tuple[Optimizer, ...]):
        self._optimizers = optimizers

    def _of(self, p: Tensor) -> Any:
        for optimizer in self._optimizers:
            if any(p is q for group in optimizer.param_groups for q in group["params"]):
                return optimizer.state
        raise KeyError(p)

    def __getitem__(self, p: Tensor) -> Any:
        return self._of(p)[p]

    def __contains__(self, p: object) -> bool:
        return any(p in optimizer.state for optimizer in self._optimizers)

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self._of(p)[p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self._of(p)[p]

    def __iter__(self) -> Iterator[Tensor]:
        return (p for optimizer in self._optimizers for p in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)
