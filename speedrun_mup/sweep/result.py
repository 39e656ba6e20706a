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

from speedrun_mup.config import TrainConfig
from speedrun_mup.config_file import from_json
from speedrun_mup.core.errors import ConfigError, in_a_line
from speedrun_mup.core.model import VOCAB_MULTIPLE
from speedrun_mup.files import printable, strict_json
from speedrun_mup.training.flops import flops_per_token

Place = tuple[int, ...]  # values on the size axes of a sweep, in their order
RUNS, RESULT = "cells", "result.json"  # of a sweep's folder: a folder for each run
SCHEMA = 1  # of result.json; part of every id
MOST_DOUBLINGS = 32.0  # either way that a grid may go
MOST_STEPS = 10**7


@dataclass(frozen=True)
class RunResult:
    """A finished run, as in its result.json.

    Args:
        sizes: Name of a size axis of the sweep -> value.
        log2_factor: On the hyperparameter.
        loss: Validation loss at the end; nan if never reached, as train_loss.
        train_loss: Mean over the last tenth of training.
        diverged: The loss or a gradient stopped being a number, or the run ended above its initial loss. That is a finding.
        reason: Of the divergence.
        curve: Training loss of steps 0, 1, 2, ...
        seconds: Wall time of the whole run; train_s: of its optimizer steps.
        flops: Of the steps that were taken.
        vocab_size: Of its data; None in a result of the first edition, which did not record it.
        made_with: Versions and device.
        bits_per_byte: Of the validation at the end, without special tokens; None where tokens do not stand for bytes.
        unit: The hyperparameter where the factor is 1; itself 1 where it is told as a factor.
        steps: Those of `curve`, of a program that does not print its loss at every step.
    """

    id: str
    arm: str
    sizes: dict[str, int]
    log2_factor: float
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
    vocab_size: int | None
    config: dict[str, Any]
    made_with: dict[str, str]
    bits_per_byte: float | None = None
    unit: float = 1.0
    steps: list[int] | None = None

    @property
    def size(self) -> int:
        """Its place on the first size axis of the sweep."""
        return next(iter(self.sizes.values()))

    @property
    def place(self) -> Place:
        """Its place on all size axes of the sweep."""
        return tuple(self.sizes.values())

    @property
    def factor(self) -> float:
        """On the hyperparameter."""
        return 2.0**self.log2_factor

    @property
    def value(self) -> float:
        """Of the hyperparameter, as the estimator takes it: absolute, or as a factor."""
        return self.unit * self.factor

    @property
    def settings(self) -> TrainConfig:
        """What was computed, as settings. Raises ConfigError for those that no run can have."""
        return from_json(json.dumps(self.config), Path(RUNS) / self.id / RESULT)

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary; where it was not recorded, padded, by the FLOPs that its head took."""
        if self.vocab_size is not None:
            return self.vocab_size
        cfg = self.settings
        per_token = self.flops / cfg.schedule.tokens_before(len(self.curve))
        return VOCAB_MULTIPLE + round((per_token - flops_per_token(cfg, VOCAB_MULTIPLE)) / (6 * cfg.width))

    def to_json(self) -> str:
        """One line of strict JSON; a number that is not finite becomes null."""
        return strict_json({"schema": SCHEMA, **asdict(self)})

    @staticmethod
    def from_json(text: str | bytes, source: Path) -> RunResult:
        """Read back `to_json`. ConfigError naming `source` for anything else."""
        try:
            values = json.loads(text)
            schema = values.pop("schema")
            if "width" in values:
                values = _of_first_edition(values)
            values = {
                "bits_per_byte": None,
                "unit": 1.0,
                "steps": None,
            } | values  # which earlier editions did not record
            if schema != SCHEMA or values.keys() != {entry.name for entry in fields(RunResult)}:
                raise ValueError("made by another version")
            values |= {name: or_nan(values[name]) for name in ("loss", "train_loss")}
            values["curve"] = [or_nan(loss) for loss in values["curve"]]
            result = RunResult(**values)
            _check_types(result)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as fault:
            why = (
                f"{printable(source)} is not a valid run result ({in_a_line(fault)}); delete it and run the sweep again"
            )
            raise ConfigError(why) from None
        return result


def in_bits_per_byte(loss: float, runs: Iterable[RunResult]) -> float | None:
    """What a validation loss comes to in bits per byte: by the median ratio in `runs` on the same data; None if no one knows.

    The ratio depends on the model only by the loss of special tokens, which bits per byte leave out.
    """
    ratios = [run.bits_per_byte / run.loss for run in runs if run.bits_per_byte and math.isfinite(run.loss)]
    return loss * float(np.median(ratios)) if ratios else None


def _check_types(result: RunResult) -> None:
    """Raises ValueError for what `run_one` cannot have written: anybody may have sent the folder."""
    names = (result.id, result.arm, result.reason, result.corpus, *result.made_with, *result.made_with.values())
    costs = (result.seconds, result.train_s, result.flops, result.bits_per_byte or 0)
    iterations = result.config["iterations"]
    whole = (*result.sizes.values(), result.vocab_size or 0, result.seed, iterations)
    good = {
        "names": all(isinstance(name, str) for name in names) and result.arm == printable(result.arm, 100),
        "whole numbers": all(type(number) is int for number in whole),
        "diverged": isinstance(result.diverged, bool),
        "unit": isinstance(result.unit, (int, float)) and 0 < result.unit < math.inf,
        "steps": result.steps is None
        or (len(result.steps) == len(result.curve) and all(type(step) is int for step in result.steps)),
        "costs": all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in costs),
    }
    good["log2_factor"] = abs(float(result.log2_factor)) <= 2 * MOST_DOUBLINGS
    good["sizes"] = (
        good["whole numbers"] and bool(result.sizes) and all(0 < size < 2**53 for size in result.sizes.values())
    )
    good["sizes"] = good["sizes"] and all(name == printable(name, 100) for name in result.sizes)
    good["curve"] = good["whole numbers"] and len(result.curve) <= iterations <= MOST_STEPS
    if wrong := [name for name, fine in good.items() if not fine]:
        raise ValueError(f"impossible: {', '.join(wrong)}")


def _of_first_edition(values: dict[str, Any]) -> dict[str, Any]:
    """The same result with today's names. The vocabulary was not recorded."""
    rest = {name: value for name, value in values.items() if name not in ("width", "octaves")}
    return rest | {"sizes": {"width": values["width"]}, "log2_factor": values["octaves"], "vocab_size": None}


def or_nan(value: float | None) -> float:
    """A number of a JSON file, where null stands for nan."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Failure:
    """A run that did not finish, and why, in one line. again: whether it may go better another time."""

    why: str
    again: bool = True


def mean_losses(results: Iterable[RunResult]) -> dict[tuple[str, Place, float], float]:
    """(arm, place, log2 factor) -> validation loss, mean over seeds; nan if one diverged."""
    losses: dict[tuple[str, Place, float], list[float]] = defaultdict(list)
    for result in results:
        losses[result.arm, result.place, result.log2_factor].append(math.nan if result.diverged else result.loss)
    return {key: float(np.mean(values)) for key, values in losses.items()}


def place_of(result: RunResult) -> tuple[str, Place, float, int]:
    """What results are sorted by."""
    return result.arm, result.place, result.log2_factor, result.seed
