"""What techniques change of a schedule: functions (Schedule, setting) -> Schedule, which change its stages or its options."""

from __future__ import annotations

from dataclasses import dataclass, replace

from speedrun_mup.training.schedules import AtStep, Schedule


@dataclass(frozen=True)
class DecayPower:
    """Weight decay that follows the learning rate's schedule to another power than the first, which is 0 or 2.

    The record's own programs since record 43 have the second: they multiply by the scheduled rate twice. 0 is decay that is
    decoupled from the schedule too, as in Loshchilov and Hutter (arXiv 1711.05101) with a constant multiplier.
    """

    power: int

    def __call__(self, step: int, now: AtStep, schedule: Schedule) -> AtStep:
        """The factor on top of the one that the learning rate brings."""
        return now._replace(decay_factor=now.lr_factor ** (self.power - 1) if now.lr_factor else 0.0)


@dataclass(frozen=True)
class MultiToken:
    """Predict further tokens with the same logits, by ClassicLarry and others, record 53 (80 steps fewer).

    Weights of the next three are 1, 1/2 and 1/4 in the first third of a run, of the next two 1 and 1/2 in the second; the last
    of them falls to 0 within its third.
    """

    def __call__(self, step: int, now: AtStep, schedule: Schedule) -> AtStep:
        """The weights of this step; a weight that has fallen to 0 is gone."""
        ends = [round(third * schedule.iterations / 3) for third in range(4)]
        for third, weights in enumerate(((1.0, 0.5, 0.25), (1.0, 0.5))):
            begin, end = ends[third : third + 2]
            if begin <= step < end:
                left = 1 - (step - begin) / (end - begin)
                return now._replace(loss_weights=(*weights[:-1], weights[-1] * left))
        return now


def predict_several(schedule: Schedule, wanted: bool) -> Schedule:
    """`schedule` with MultiToken."""
    return replace(schedule, options=(*schedule.options, MultiToken()))


def set_decay_schedule(schedule: Schedule, name: str) -> Schedule:
    """`schedule` with weight decay that follows `name`: squared or constant."""
    power = {"squared": 2, "constant": 0}[name]
    return replace(schedule, options=(*schedule.options, DecayPower(power)))
