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


def set_decay_schedule(schedule: Schedule, name: str) -> Schedule:
    """`schedule` with weight decay that follows `name`: squared or constant."""
    power = {"squared": 2, "constant": 0}[name]
    return replace(schedule, options=(*schedule.options, DecayPower(power)))
