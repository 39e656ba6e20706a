"""What one rank does for all: its outcome, a fault of the user included, reaches every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from speedrun_mup.core.distributed import World
from speedrun_mup.core.errors import UserError


def attempt(work: Callable[[], Any]) -> Any:
    """The result of `work`, or its UserError as a value, for other ranks to hear of."""
    try:
        return work()
    except UserError as fault:
        return fault


def unwrap(outcome: Any) -> Any:
    """What `attempt` gave, or its UserError raised."""
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def on_main(world: World, work: Callable[[], Any]) -> Any:
    """The result of `work` on rank 0, which alone does it, on every rank; its UserError is raised on all."""
    return unwrap(world.from_main(attempt(work) if world.is_main else None))
