"""The runs that a measurement starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from speedrun_mup.core.errors import UserError

CurveKey = tuple[str, int, float, int]  # arm, width, lr, seed


class TransferError(UserError):
    """A table of runs that cannot be read or analysed."""

    exit_code = 3


@dataclass(frozen=True)
class Run:
    """One finished run. lr: learning rate, or whatever was turned in its place, absolute or as a factor. loss: nan or inf
    if the run diverged."""

    width: int
    lr: float
    seed: int
    loss: float
    arm: str = "runs"

    @property
    def log2_lr(self) -> float:
        """Position on the learning-rate axis, rounded so that equal rates written differently are one grid point."""
        return round(math.log2(self.lr), 6)


LR = "lr"  # the knob, and its column in a table, unless another hyperparameter is turned


def is_rate(knob: str) -> bool:
    """Whether `knob` names a learning rate, or a factor on some."""
    return knob in (LR, "lr_scale") or knob.endswith("_lr")


def knob_name(knob: str) -> str:
    """What is turned, for a reader: "learning rate" for all that are one, else the hyperparameter's own name."""
    return "learning rate" if is_rate(knob) else knob


def lr_text(log2_lr: float) -> str:
    """A learning rate, or what was turned, for a reader: 2^-1.5 on a grid of quarter octaves, else a plain number."""
    quarters = 4 * log2_lr
    return f"2^{log2_lr:g}" if abs(quarters - round(quarters)) < 1e-5 else f"{2**log2_lr:.3g}"
