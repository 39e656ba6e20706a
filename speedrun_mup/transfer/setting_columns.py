"""What a table's further columns say about its runs: settings that must be alike, and those that may follow a rule of size.

A column that cannot matter (a name, a time, a host, a path, a count of parameters) raises no doubt, however it varies.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from speedrun_mup.files import printable
from speedrun_mup.transfer.axes import RATE, ROUNDED, SIZES, Axes
from speedrun_mup.transfer.claims import MADE_WITH, Doubt, values_doubt
from speedrun_mup.transfer.points import Point

# What must be the same in all runs of an arm: settings that a table may list and an estimator cannot see.
TEXTS = ("data", "dataset", "corpus", "tokenizer")
ALIKE = frozenset(
    (
        *TEXTS,
        *("depth", "n_layer", "n_layers", "num_layers", "layers", "num_hidden_layers", "activation", "dropout"),
        *("steps", "iterations", "num_steps", "max_steps", "epochs", "tokens", "num_tokens", "train_tokens"),
        *("batch", "batch_size", "global_batch_size", "seq_len", "sequence_length", "context", "context_length"),
        *("block_size", "vocab_size", "precision", "optimizer", "parametrization", "parameterization"),
        *("beta1", "beta2", "betas", "adam_beta1", "adam_beta2", "momentum", "grad_clip", "clip_grad", "max_grad_norm"),
        *("warmup", "warmup_steps", "warmup_iters", "warmup_ratio", "lr_schedule", "schedule", "scheduler"),
    )
)
# What rules for a size change: a power of it, and of what was tuned, is part of the rule that is judged.
SCALED = frozenset(("weight_decay", "wd", "eps", "epsilon", "adam_eps", "init_std", "initializer_range", "min_lr"))
RATES = frozenset((RATE, "learning_rate", "max_lr", "peak_lr", "base_lr", "lr_scale"))
SAYS_NOTHING = ("", "nan", "none", "null", "n/a", "na")
SPELLED = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def is_setting(column: str, axes: Axes) -> bool:
    """Whether runs that differ in a column differ in a setting. A run's rate is one where something else was tuned, and
    so is every size but the measured one."""
    name = _name(column)
    sizes = {size: {size, *SIZES[size].also} for size in SIZES}
    if name in sizes.get(axes.size, {axes.size}):
        return False
    return name in MADE_WITH or name in ALIKE or name in set.union(*sizes.values()) or _follows(name, axes)


def judge_settings(
    columns: Sequence[tuple[str, Sequence[tuple[str, Point]]]], axes: Axes
) -> tuple[list[Doubt], list[str]]:
    """Doubts about runs of one arm that differ in a setting, and notes on what differs as it may.

    Args:
        columns: header, and (cell, run) of every row, of columns that `is_setting`; two may be called the same.
        axes: what was scaled, and what was tuned.
    """
    doubts, notes = [], []
    for column, cells in columns:
        # A diverged run may have ended early, on fewer steps and tokens.
        told = [(_value(column, cell), run) for cell, run in cells if math.isfinite(run.loss)]
        told = [(value, run) for value, run in told if value]
        arms: dict[str, list[tuple[str, Point]]] = defaultdict(list)
        for value, run in told:
            arms["" if _name(column) in MADE_WITH else run.arm].append((value, run))
        lone = len(arms) == 1
        kind = printable(column.strip().lower(), 60)
        for arm, some in arms.items():
            if not _one_setting(column, some):
                power = _power(some, axes) if _follows(_name(column), axes) else None
                where = "" if lone else f"arm {printable(arm, 40)}: "
                if axes.scale.leads(_name(column), _pairs(some, axes)):
                    notes.append(f"{where}{kind} follows from {axes.size}, as it must where all else stays")
                elif power is None:
                    doubts.append(values_doubt(kind, _by_value(some), axes, None if lone else arm))
                elif abs(power) > ROUNDED:
                    notes.append(
                        f"{where}{kind} goes as {axes.size}^{power:.3g}: counted as part of the rule that is judged"
                    )
        notes += _between_arms(kind, arms)
    return doubts, notes


def _name(column: str) -> str:
    """A column's name in its plainest form: n_layer of config/model.nLayer."""
    last = re.split(r"[/.:]", column.strip())[-1]
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", last).lower()).strip("_")


def _follows(name: str, axes: Axes) -> bool:
    return name in SCALED or (name in RATES and not axes.is_rate)


def _value(column: str, cell: str) -> str:
    """A cell in one spelling, "" if it says nothing: of several for a number, a type, a device, a folder of data."""
    text, name = cell.strip().lower(), _name(column)
    if name == "device":
        text = re.sub(r":[0-9]+$", "", text)
    elif name in ("dtype", "precision"):
        text = text.removeprefix("torch.")
        text = SPELLED.get(text, text)
    elif name in TEXTS:
        text = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    number = _number(text)
    return "" if text in SAYS_NOTHING else text if number is None else f"{number:.12g}"


def _number(text: str) -> float | None:
    """The number in a cell; None for a word, and for what is not finite, which is no nearer to a number than a word."""
    try:
        number = float(text) if "_" not in text else math.inf
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _by_value(cells: Sequence[tuple[str, Point]]) -> dict[str, list[Point]]:
    runs: dict[str, list[Point]] = defaultdict(list)
    for value, run in cells:
        runs[value].append(run)
    return runs


def _one_setting(column: str, cells: Sequence[tuple[str, Point]]) -> bool:
    """Whether these are one value, numbers up to rounding; or no setting at all, as every run has its own."""
    values = {value for value, _ in cells}
    numbers = [_number(value) for value in values]
    if None not in numbers:
        known = [number for number in numbers if number is not None]
        if max(known) - min(known) <= ROUNDED * max(map(abs, known)):
            return True
    return len(values) == 1 or (len(values) == len(cells) and _name(column) in ("batch", *TEXTS))


def _power(cells: Sequence[tuple[str, Point]], axes: Axes) -> float | None:
    """The power of the size that a setting follows, next to one of what was tuned; None if it follows none."""
    numbers = [_number(value) for value, _ in cells]
    known = [math.log(number) for number in numbers if number is not None and number > 0]
    if len(known) < len(cells):
        return None
    place = [(1.0, math.log(run.sizes[axes.size]), math.log(run.value)) for _, run in cells]
    design, target = np.array(place), np.array(known)
    slopes = np.linalg.lstsq(design, target, rcond=None)[0]
    return float(slopes[1]) if np.abs(design @ slopes - target).max() <= ROUNDED else None


def _pairs(cells: Sequence[tuple[str, Point]], axes: Axes) -> list[tuple[float, float]]:
    """(measured size, number in a cell); of a word nan, which nothing is close to."""
    numbers = ((_number(value), run) for value, run in cells)
    return [(float(run.sizes[axes.size]), math.nan if value is None else value) for value, run in numbers]


def _between_arms(kind: str, arms: Mapping[str, Sequence[tuple[str, Point]]]) -> Iterator[str]:
    """A note on arms that differ in a setting: that may be what they are for."""
    each = {arm: {value for value, _ in some} for arm, some in arms.items()}
    if len(each) > 1 and all(len(values) == 1 for values in each.values()) and len(set.union(*each.values())) > 1:
        told = [f"{printable(min(values), 24)} ({printable(arm, 40)})" for arm, values in each.items()]
        yield f"arms differ in {kind}: {', '.join(told[:4])}" + (" and others" if len(told) > 4 else "")
