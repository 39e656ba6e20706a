"""The runs that a measurement starts from, each a point on two axes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from speedrun_mup.core.errors import UserError

CurveKey = tuple[str, int, float, int]  # arm, size, hyperparameter value, seed


class TransferError(UserError):
    """A table of runs that cannot be read or analysed."""

    exit_code = 3


@dataclass(frozen=True)
class Point:
    """One finished run.

    Args:
        sizes: Name of a size axis -> value; the measured one, and others that are known.
        value: Of the hyperparameter, absolute or as a factor; above zero.
        loss: nan or inf if the run diverged.
        arm: What else the run shares with others: rules and optimizer.
    """

    sizes: Mapping[str, int] = field(hash=False)
    value: float
    seed: int
    loss: float
    arm: str = "runs"

    @property
    def log2_value(self) -> float:
        """Position on the hyperparameter's axis, rounded so that equal values written differently are one grid point."""
        return round(math.log2(self.value), 6)


def along(points: Iterable[Point], size: str, names: Collection[str]) -> list[Point]:
    """Runs over several sizes as curves over one: what a run has of the others becomes part of its arm's name.

    Args:
        points: Runs with all sizes of `names`.
        size: The axis that is left.
        names: All axes.
    """
    others = [name for name in names if name != size]
    return [
        replace(
            point,
            arm=slice_name(point.arm, {name: point.sizes[name] for name in others}),
            sizes=_without(point, others),
        )
        for point in points
    ]


def _without(point: Point, others: Collection[str]) -> dict[str, int]:
    return {name: value for name, value in point.sizes.items() if name not in others}


def slice_name(arm: str, others: Mapping[str, int]) -> str:
    """How an arm is called at one place of the other sizes: "mup, width 64"."""
    return ", ".join([arm, *(f"{name} {value}" for name, value in others.items())])


def whole_arm(name: str) -> str:
    """The arm of a slice."""
    return name.partition(", ")[0]


def relative_to_rule(points: Iterable[Point], drifts: Mapping[str, float], base: Mapping[str, int]) -> list[Point]:
    """Runs with the hyperparameter over what a rule predicts, so that the drift of a right rule is 0.

    Args:
        points: Runs with absolute values.
        drifts: Size axis -> what the rule says, in log2 per doubling: 0.5 for a rate that grows as the root of the batch.
        base: Where the rule's factor is 1.
    """

    def by_rule(point: Point) -> float:
        return math.prod((point.sizes[name] / base[name]) ** drift for name, drift in drifts.items())

    return [replace(point, value=point.value / by_rule(point)) for point in points]


def value_text(log2_value: float) -> str:
    """A value of the hyperparameter for a reader: 2^-1.5 on a grid of quarter steps, else a plain number."""
    quarters = 4 * log2_value
    return f"2^{log2_value:g}" if abs(quarters - round(quarters)) < 1e-5 else f"{2**log2_value:.3g}"
