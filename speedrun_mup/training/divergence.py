"""Whether a run's numbers make sense: what all ranks vote on every step, losses that jump, and runs that diverged."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.core.utils import World

SPIKE_WINDOW = 128  # losses that a new one is compared with
SPIKE_FROM = 32  # fewer say too little
SPIKE_SIGMAS = 6.0  # both as OLMo-core's SkipStep optimizer has them
LARGEST_WEIGHT = 1e5  # runs that learn stay below a hundredth of it
JUDGED_FROM = 20  # steps: the first ones may raise the loss in a run that learns
JUDGED_SHARE = 0.1  # of the steps so far; the median of their losses is judged


@dataclass(frozen=True)
class StepStatus:
    """What all ranks agreed on. loss: summed over ranks; bad: something is not finite; stop: someone must.

    grad_norm: of the gradient summed over ranks, all parameters together.
    """

    loss: float
    bad: bool
    stop: bool
    grad_norm: float


class FiniteCheck:
    """One step's all-reduced loss, finiteness and wish to stop. Nothing here makes the host wait for the device.

    is_finite: a boolean scalar on the device, for the optimizers. `read` waits; a step later there is nothing to wait for.
    """

    def __init__(self, step: int, gradients: dict[str, Tensor], loss_sum: Tensor, stop: bool, world: World):
        self.step, self.names, self.loss_sum = step, list(gradients), loss_sum
        self._norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(gradients.values()))])
        bad = ~(self._norms.isfinite().all() & loss_sum.isfinite())
        vote = torch.stack([loss_sum.nan_to_num(0, 0, 0), bad.float(), torch.full_like(loss_sum, float(stop))])
        world.all_reduce(vote).wait()
        self.is_finite = vote[1] == 0
        self._told = [_to_host(vote), _to_host(torch.linalg.vector_norm(self._norms))]
        self._arrived = _arrival(vote)

    def sum_norms(self, squares: Iterable[Tensor], world: World) -> None:
        """Have the gradient's norm over all ranks, where there are several. One all-reduce of one number.

        squares: the squared norms of what this rank's optimizers had of the summed gradient. A rank's own gradient does
            not show it, because gradients of ranks add up before they are squared.
        """
        if world.size > 1:
            total = torch.stack(list(squares)).sum()
            world.all_reduce(total).wait()
            self._told[1] = _to_host(total.sqrt())
            self._arrived = _arrival(total)

    def read(self) -> StepStatus:
        """What was decided; the same on all ranks."""
        if self._arrived:
            self._arrived.synchronize()
        loss, bad, stop = self._told[0].tolist()
        return StepStatus(loss, bad > 0, stop > 0, self._told[1].item())

    def norms(self) -> dict[str, float]:
        """This rank's loss, as "the loss", and the norm of every gradient."""
        return {"the loss": self.loss_sum.item(), **dict(zip(self.names, self._norms.tolist(), strict=True))}


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", non_blocking=tensor.is_cuda)  # elsewhere nothing shows when it has arrived


def _arrival(tensor: Tensor) -> Any:
    """An event after all that was asked of a GPU so far; None elsewhere."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def not_finite(norms: dict[str, float]) -> list[str]:
    """The names of the values that are not finite; a loss that is not says nothing more than its gradients do."""
    names = [name for name, value in norms.items() if not math.isfinite(value)]
    return names[1:] if names[1:] and names[0] == "the loss" else names


class LossSpikeDetector:
    """Detects a loss that lies SPIKE_SIGMAS standard deviations above the mean of the last SPIKE_WINDOW.

    history: the losses so far, of a resumed run.
    """

    def __init__(self, history: Iterable[float] = ()):
        self._losses = deque(history, maxlen=SPIKE_WINDOW)

    @property
    def history(self) -> list[float]:
        """The losses that the next one is compared with."""
        return list(self._losses)

    def update(self, loss: float) -> str | None:
        """What there is to say about the next loss, if it is a spike."""
        losses = self.history
        self._losses.append(loss)
        if len(losses) < SPIKE_FROM:
            return None
        mean, sigma = statistics.fmean(losses), statistics.stdev(losses)
        if loss <= mean + SPIKE_SIGMAS * sigma:
            return None
        return f"the loss jumped to {loss:.4f}; the last {len(losses)} were {mean:.4f} +- {sigma:.4f}"


def exploded_weights(weights: Mapping[str, Tensor]) -> str:
    """What there is to say about weights beyond any sane size, or nothing. Waits for the device.

    The norms in the model and the cap on its logits keep the loss finite, whatever becomes of the weights.
    """
    largest = torch.stack([size.float() for size in torch._foreach_norm(list(weights.values()), math.inf)]).tolist()
    name, size = max(zip(weights, largest, strict=True), key=lambda pair: math.inf if pair[1] != pair[1] else pair[1])
    return "" if size <= LARGEST_WEIGHT else f"the weights exploded: {name} has a value of {size:.3g}"


def judged_losses(steps: int) -> int:
    """How many of the last losses show where a run of `steps` steps stands: a tenth, at least 5, of those that are kept."""
    return min(max(round(JUDGED_SHARE * steps), 5), SPIKE_WINDOW)


def failed_to_learn(losses: Sequence[float], untrained: float, steps: int, grad_norm: float = math.nan) -> str:
    """What there is to say about a run that is worse than a model that was never trained, or nothing.

    The median of the last losses decides, because a run may pass through a spike. The first JUDGED_FROM steps say nothing.

    Args:
        losses: the training losses so far, at least the last ones.
        untrained: the loss of the model before its first step.
        steps: how many were taken.
        grad_norm: of the last step; 0 means that nothing can be learned any more.

    Returns:
        A sentence, or "".
    """
    last = list(losses)[-judged_losses(steps) :]
    if steps < JUDGED_FROM or not last:
        return ""
    end = statistics.median(last)
    if grad_norm == 0.0:
        return f"the gradient is zero since the activations overflowed; the loss is {end:.4f}, untrained it was {untrained:.4f}"
    if end <= untrained + 1e-3 * untrained:
        return ""
    return f"the loss was {end:.4f} in the median of the last {len(last)} steps, above the {untrained:.4f} of the untrained model"
