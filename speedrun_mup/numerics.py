"""Whether a run's numbers are still numbers: what all ranks vote on every step, and losses that jump."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from speedrun_mup.core.utils import World

SPIKE_WINDOW = 128  # losses that a new one is compared with
SPIKE_FROM = 32  # fewer say too little
SPIKE_SIGMAS = 6.0  # both as OLMo-core's SkipStep optimizer has them


@dataclass(frozen=True)
class Verdict:
    """What all ranks agreed on. loss: summed over ranks; bad: something is not finite; stop: someone must."""

    loss: float
    bad: bool
    stop: bool


class Vote:
    """One step's all-reduced loss, finiteness and wish to stop. Nothing here makes the host wait for the device.

    good: a boolean scalar on the device, for the optimizers. `read` waits; a step later there is nothing to wait for.
    """

    def __init__(self, step: int, gradients: dict[str, Tensor], loss_sum: Tensor, stop: bool, world: World):
        self.step, self.names, self.loss_sum = step, list(gradients), loss_sum
        self.norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(gradients.values()))])
        bad = ~(self.norms.isfinite().all() & loss_sum.isfinite())
        vote = torch.stack([loss_sum.nan_to_num(0, 0, 0), bad.float(), torch.full_like(loss_sum, float(stop))])
        world.all_reduce(vote).wait()
        self.good = vote[1] == 0
        self._told = vote.to("cpu", non_blocking=vote.is_cuda)  # elsewhere nothing tells when it has arrived
        self._arrived = torch.cuda.Event() if vote.is_cuda else None
        if self._arrived:
            self._arrived.record()

    def read(self) -> Verdict:
        """What was decided; the same on all ranks."""
        if self._arrived:
            self._arrived.synchronize()
        loss, bad, stop = self._told.tolist()
        return Verdict(loss, bad > 0, stop > 0)

    def evidence(self) -> dict[str, float]:
        """This rank's loss, as "the loss", and the norm of every gradient."""
        return {"the loss": self.loss_sum.item(), **dict(zip(self.names, self.norms.tolist(), strict=True))}


def not_finite(evidence: dict[str, float]) -> list[str]:
    """The names of the values that are not finite; a loss that is not says nothing more than its gradients do."""
    names = [name for name, value in evidence.items() if not math.isfinite(value)]
    return names[1:] if names[1:] and names[0] == "the loss" else names


class SpikeWatch:
    """Tells when a loss lies SPIKE_SIGMAS standard deviations above the mean of the last SPIKE_WINDOW.

    history: the losses so far, of a resumed run.
    """

    def __init__(self, history: Iterable[float] = ()):
        self._losses = deque(history, maxlen=SPIKE_WINDOW)

    @property
    def history(self) -> list[float]:
        """The losses that the next one is compared with."""
        return list(self._losses)

    def see(self, loss: float) -> str | None:
        """What there is to say about the next loss, if it is a spike."""
        losses = self.history
        self._losses.append(loss)
        if len(losses) < SPIKE_FROM:
            return None
        mean, sigma = statistics.fmean(losses), statistics.stdev(losses)
        if loss <= mean + SPIKE_SIGMAS * sigma:
            return None
        return f"the loss jumped to {loss:.4f}; the last {len(losses)} were {mean:.4f} +- {sigma:.4f}"
