"""The runs that a measurement starts from, each a point on two axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

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


def value_text(log2_value: float) -> str:
    """A value of the hyperparameter for a reader: 2^-1.5 on a grid of quarter steps, else a plain number."""
    quarters = 4 * log2_value
    return f"2^{log2_value:g}" if abs(quarters - round(quarters)) < 1e-5 else f"{2**log2_value:.3g}"
