"""What becomes of a run when its numbers go bad or a save fails: continue, skip the step, roll back, or stop in one line."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.distributed import World
from speedrun_mup.core.errors import Diverged, NonFiniteError
from speedrun_mup.core.model import GPT
from speedrun_mup.data.batches import Batches
from speedrun_mup.training.checkpoint import CheckpointError, Checkpoints
from speedrun_mup.training.divergence import (
    FiniteCheck,
    LossSpikeDetector,
    exploded_weights,
    failed_to_learn,
    not_finite,
)
from speedrun_mup.training.run_folder import RunFolder

SAVE_ATTEMPTS = 3  # failed saves in a row before the run gives up
BAD_STEPS = 10  # skipped or rolled back before the run gives up


class RollBack(Exception):
    """The numbers went bad at a step: the run is to continue from its last checkpoint, with the data after that step."""

    def __init__(self, step: int):
        self.step = step


class Recovery:
    """Watches a run's numbers and saves, and says on all ranks alike what is to be done about them.

    Args:
        cfg: on_nonfinite is the policy.
        world: all its ranks.
        model: whose gradients and weights are watched.
        folder: gets dumps and warnings.
        checkpoints: of the run.
    """

    def __init__(self, cfg: TrainConfig, world: World, model: GPT, folder: RunFolder, checkpoints: Checkpoints):
        self.cfg, self.world, self.model, self.folder, self.checkpoints = cfg, world, model, folder, checkpoints
        self.spikes = LossSpikeDetector()
        self.pending: deque[FiniteCheck] = deque()  # steps not acted on yet: so many wait for the device to get there
        self.lag = 1 if world.device.type == "cuda" else 0
        self.failed_saves, self.bad_steps = 0, 0
        self.last_grad_norm = math.nan
        self.untrained_loss = math.log(model.cfg.padded_vocab)  # the head begins at zero

    def check(self, step: int, loss_sum: Tensor, stop: bool) -> FiniteCheck:
        """Ask all ranks whether the loss and every gradient are finite, and whether anyone was asked to stop.

        Comes before the optimizers: one NaN in one entry would make Muon's whole update NaN. After a bad step no later
        one changes anything either, unless the policy is to skip, until the host has heard of it.
        """
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        check = FiniteCheck(step, gradients, loss_sum, stop, self.world)
        if self.pending and self.cfg.on_nonfinite != "skip":
            check.is_finite &= self.pending[-1].is_finite
        self.pending.append(check)
        return check

    def record_loss(self, step: int, loss: float, grad_norm: float) -> None:
        """Note a step that counted, and warn if its loss jumped."""
        self.last_grad_norm = grad_norm
        if spike := self.spikes.update(loss):
            self.folder.log.say(f"warning: step {step}: {spike}")

    def handle_bad_step(self, check: FiniteCheck, batches: Batches, skipped: int) -> None:
        """Dump the step whose update was withheld, and do as `on_nonfinite` says. NonFiniteError after BAD_STEPS of them.

        Raises NonFiniteError to stop, RollBack to roll back, on all ranks. skipped: micro-batches left out of the data so far.
        """
        norms = self.world.gather_objects(check.norms())
        named = {rank: not_finite(values) for rank, values in enumerate(norms)}
        where = "; ".join(f"rank {rank}: {', '.join(names[:3])}" for rank, names in named.items() if names)
        what = f"step {check.step}: not finite on {where}"
        if self.folder.find():
            dump = _describe_bad_step(check.step, skipped, batches, norms)
            self.folder.log.dump(f"bad-step-{check.step:08d}.json", dump)
        self.bad_steps += 1
        if self.cfg.on_nonfinite == "stop" or self.bad_steps > BAD_STEPS:
            raise NonFiniteError(
                f"{what}; the weights are those before the step, {self.folder.path} holds a dump. Lower --lr-scale, look "
                "at the data, or see --on-nonfinite"
            )
        roll_back = self.cfg.on_nonfinite == "rollback"
        self.folder.log.say(f"warning: {what}; {'rolling back' if roll_back else 'step skipped'}")
        if roll_back:
            raise RollBack(check.step)

    def refuse_exploded(self, step: int) -> None:
        """Raise Diverged if a weight is beyond any sane size after `step` steps."""
        if said := exploded_weights(dict(self.model.named_parameters())):
            raise Diverged(self._diverged(step, said))

    def refuse_diverged(self, step: int) -> None:
        """Raise Diverged if a run that is at its end is worse than untrained."""
        self.refuse_exploded(step)
        if said := self.failure_to_learn(step):
            raise Diverged(self._diverged(step, said))

    def failure_to_learn(self, step: int) -> str:
        """What there is to say, after `step` steps, about losses above that of the untrained model."""
        return failed_to_learn(self.spikes.history, self.untrained_loss, step, self.last_grad_norm)

    def _diverged(self, step: int, said: str) -> str:
        there = max((path.name for path in self.checkpoints.root.glob("step-*")), default="")
        kept = f"checkpoints up to {there} are kept" if there else "there is no checkpoint"
        return f"step {step}: diverged: {said}; {kept}. Lower --lr-scale (it was {self.cfg.lr_scale:g})"

    def poll_checkpoint(self, wait: bool = False) -> None:
        """Learn how a save in the background ended, if it has; wait: until it has."""
        with self.tolerate_failed_saves():
            if self.checkpoints.poll(wait):
                self.failed_saves = 0

    @contextmanager
    def tolerate_failed_saves(self, last: bool = False) -> Iterator[None]:
        """Turn a CheckpointError into a warning, unless it is the last save or the SAVE_ATTEMPTS-th failure in a row."""
        try:
            yield
        except CheckpointError as fault:
            self.failed_saves += 1
            if last or self.failed_saves >= SAVE_ATTEMPTS:
                raise
            self.folder.log.say(f"warning: {fault}; training continues")


def _describe_bad_step(step: int, skipped: int, batches: Batches, norms: list[dict[str, float]]) -> dict[str, Any]:
    """Where the step's tokens came from, and every rank's loss and gradient norms."""
    taken = [batches.indices(step, rank, len(norms), skipped) for rank in range(len(norms))]
    return {
        "step": step,
        "first_micro_batch": taken[0].start,
        "ranks": [
            {
                "micro_batches": [dict(zip(("shard", "first_token"), batches.place(i))) for i in taken[rank]],
                "loss": values["the loss"],
                "gradient_norms": {name: value for name, value in values.items() if name != "the loss"},
            }
            for rank, values in enumerate(norms)
        ],
    }
