"""What a finished run leaves: its result.json, written and read back."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from speedrun_mup.core.errors import ConfigError, in_a_line
from speedrun_mup.files import printable, strict_json
from speedrun_mup.sweep.spec import MOST_OCTAVES, SCHEMA

MOST_STEPS = 10**7


@dataclass(frozen=True)
class CellResult:
    """A finished cell, as in its result.json.

    loss: validation loss at the end; train_loss: mean over the last tenth of training; both nan if never reached.
    diverged: the loss or a gradient stopped being a number, or the run ended above its initial loss. That is a finding.
    reason: of the divergence. curve: training loss of steps 0, 1, 2, ... seconds: of the whole cell; train_s: of its
    optimizer steps. flops: of the steps that were taken. made_with: versions and device.
    """

    id: str
    arm: str
    width: int
    octaves: float
    seed: int
    loss: float
    train_loss: float
    diverged: bool
    reason: str
    curve: list[float]
    seconds: float
    train_s: float
    flops: float
    corpus: str
    config: dict[str, Any]
    made_with: dict[str, str]

    @property
    def lr(self) -> float:
        """The factor on the knob."""
        return 2.0**self.octaves

    def to_json(self) -> str:
        """One line of strict JSON; a number that is not finite becomes null."""
        return strict_json({"schema": SCHEMA, **asdict(self)})

    @staticmethod
    def from_json(text: str | bytes, source: Path) -> CellResult:
        """Read back `to_json`. ConfigError naming `source` for anything else."""
        try:
            values = json.loads(text)
            if values.pop("schema") != SCHEMA or values.keys() != {entry.name for entry in fields(CellResult)}:
                raise ValueError("made by another version")
            values |= {name: or_nan(values[name]) for name in ("loss", "train_loss")}
            values["curve"] = [or_nan(loss) for loss in values["curve"]]
            result = CellResult(**values)
            _check_types(result)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as fault:
            why = f"{printable(source)} is no result of a run ({in_a_line(fault)}); delete it and run the sweep again"
            raise ConfigError(why) from None
        return result


def _check_types(result: CellResult) -> None:
    """Raises ValueError for what `run_cell` cannot have written: anybody may have sent the folder."""
    names = (result.id, result.arm, result.reason, result.corpus, *result.made_with, *result.made_with.values())
    costs = (result.seconds, result.train_s, result.flops)
    iterations = result.config["iterations"]
    good = {
        "names": all(isinstance(name, str) for name in names) and result.arm == printable(result.arm, 100),
        "whole numbers": all(type(number) is int for number in (result.width, result.seed, iterations)),
        "diverged": isinstance(result.diverged, bool),
        "costs": all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in costs),
    }
    good["octaves"] = abs(float(result.octaves)) <= 2 * MOST_OCTAVES
    good["width"] = good["whole numbers"] and 0 < result.width < 2**31
    good["curve"] = good["whole numbers"] and len(result.curve) <= iterations <= MOST_STEPS
    if wrong := [name for name, fine in good.items() if not fine]:
        raise ValueError(f"impossible: {', '.join(wrong)}")


def or_nan(value: float | None) -> float:
    """A number of a JSON file, where null stands for nan."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Failure:
    """A cell that came to nothing, and why, in one line."""

    why: str


def mean_losses(results: Iterable[CellResult]) -> dict[tuple[str, int, float], float]:
    """(arm, width, octaves) -> validation loss, mean over seeds; nan if one diverged."""
    losses: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for result in results:
        losses[result.arm, result.width, result.octaves].append(math.nan if result.diverged else result.loss)
    return {key: float(np.mean(values)) for key, values in losses.items()}


def place_of(result: CellResult) -> tuple[str, int, float, int]:
    """What results are sorted by."""
    return result.arm, result.width, result.octaves, result.seed
