"""What every reader of logs gives: runs with settings and curves, and how these become one row for each run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speedrun_mup.files import SMALL, printable, read_bytes
from speedrun_mup.transfer.points import TransferError

MOST_ENTRIES, MOST_DEPTH = 5_000, 12  # settings and curves of a run; levels of nested settings
STEPS = ("step", "_step", "global_step", "training_iteration", "iteration", "iterations", "iter", "steps", "epoch")
KINDS = (
    "kind",
    "split",
    "phase",
    "stage",
    "mode",
)  # what tells the records of a log apart, as {"split": "val", "loss": 3}
SETTINGS = (
    "params.json",
    "hparams.yaml",
    "hparams.json",
    "config.json",
    "config.yaml",
    "args.json",
    ".hydra/config.yaml",
)
PEAK = "peak/"  # before the name of a learning rate that was logged: the column of its largest value
LAST, MIN = "last", "min"
LOSS_OF_A_RUN = (LAST, MIN)


class Curve:
    """A number that was logged again and again, of which only what can stand for the run is kept."""

    def __init__(self) -> None:
        self.step, self.start, self.first = -math.inf, math.inf, math.nan
        self.last, self.lowest, self.highest = math.nan, math.inf, -math.inf

    @staticmethod
    def of(values: Iterable[tuple[float, float]]) -> Curve:
        """The curve of these steps and values."""
        curve = Curve()
        for step, value in values:
            curve.add(step, value)
        return curve

    def add(self, step: float, value: float) -> None:
        """One value; of two at one step the later one counts."""
        if step < self.start:
            self.start, self.first = step, value
        if step >= self.step:
            self.step, self.last = step, value
        if math.isfinite(value):
            self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)

    def loss(self, which: str) -> float:
        """What stands for the run: its last value, or its lowest; a run whose last value is no number has diverged."""
        return self.lowest if which == MIN and math.isfinite(self.last) else self.last


@dataclass
class LoggedRun:
    """A run as a program logged it.

    Args:
        name: For a reader, and to find settings in.
        settings: Name, nested ones with "/" between, -> value as text.
        curves: Name -> what was logged.
        state: What the log says of its end, in the log's word; "" for nothing.
    """

    name: str
    settings: dict[str, str] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    state: str = ""

    def log(self, record: Mapping[str, Any], at: float) -> None:
        """Everything of a record that is a number. at: its step, if the record has none."""
        values = dict(flat(record))
        step = next((number for name in STEPS if (number := _number(values.get(name, ""))) is not None), at)
        kind = next((values[name] for name in KINDS if values.get(name) and _number(values[name]) is None), "")
        for name, text in values.items():
            number = _number(text)
            if number is not None and name not in STEPS:
                self.add(f"{kind}/{name}" if kind and not name.startswith(kind) else name, step, number)

    def add(self, name: str, step: float, value: float) -> None:
        """One value of one curve."""
        if name not in self.curves:
            if len(self.curves) >= MOST_ENTRIES:
                raise TransferError(f"run {printable(self.name, 80)}: more than {MOST_ENTRIES:,} curves")
            self.curves[name] = Curve()
        self.curves[name].add(step, value)


@dataclass
class Rows:
    """Rows of named cells, one for each run.

    Args:
        words: What was read, for a reader.
        header: Names of the columns.
        rows: Where a row is, and its cells, as often as it is asked.
        curves: Of logs the columns that were logged again and again, among which the loss is; None for a table.
        also: Role -> what this format calls it, beyond the names that are known.
        notes: What a reader should know about them.
        whole: Where they are from.
    """

    words: str
    header: list[str]
    rows: Iterable[tuple[str, list[str]]]
    curves: frozenset[int] | None = None
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def settle(self, numbers: Mapping[str, int]) -> list[str]:
        """Decide how numbers are written, from the columns (role -> number) that hold them; notes on it. TransferError if that
        is unclear."""
        return []


def rows_of(runs: Sequence[LoggedRun], words: str, path: Path, which: str, names: str) -> Rows:
    """Logged runs as rows: settings, the largest value of every learning rate that was logged, curves by one value each.

    Args:
        runs: As read.
        words: What they are.
        path: Where from.
        which: Value of a curve that stands for the run, LAST or MIN.
        names: Pattern of the runs' names, with {width} and the like where settings are; "" for none.
    """
    for run in runs:
        given = _by_pattern(run.name, names) if names else {}
        rates = {name: curve.highest for name, curve in run.curves.items() if _is_rate(name)}
        peaks = {f"{PEAK}{name}": text_of(value) for name, value in rates.items() if math.isfinite(value)}
        run.settings = _in_name(run.name) | run.settings | given | peaks
        if run.state:
            run.settings.setdefault("state", run.state)
    settings = list(dict.fromkeys(name for run in runs for name in run.settings))
    curves = list(dict.fromkeys(name for run in runs for name in run.curves))
    steps = ["steps"] if any(math.isfinite(_last_step(run)) for run in runs) else []
    rows = [
        (
            f"{printable(path)}: run {printable(run.name, 80)}",
            [
                *(run.settings.get(name, "") for name in settings),
                *([text_of(_last_step(run))] if steps else []),
                *(text_of(run.curves[name].loss(which)) if name in run.curves else "" for name in curves),
            ],
        )
        for run in runs
    ]
    first = len(settings) + len(steps)
    note = f"read as {words}: {len(runs)} runs; the loss of a run is its {'lowest' if which == MIN else which} value"
    curved = frozenset(range(first, first + len(curves)))
    return Rows(words, [*settings, *steps, *curves], rows, curved, notes=[note])


def _last_step(run: LoggedRun) -> float:
    return max((curve.step for curve in run.curves.values() if math.isfinite(curve.step)), default=math.nan)


def _is_rate(name: str) -> bool:
    return bool(re.search(r"(?:^|[^a-z])(?:lr|learning_?rate)(?:$|[^a-z])", name.lower()))


def text_of(number: float) -> str:
    """A number as a cell; whole ones without a point."""
    return str(int(number)) if math.isfinite(number) and number == int(number) and abs(number) < 2**53 else repr(number)


def short_float(number: float) -> float:
    """A number of single precision in its shortest form: 3.4, not 3.4000000953674316."""
    return float(str(np.float32(number)))


def _number(text: str) -> float | None:
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def _by_pattern(name: str, pattern: str) -> dict[str, str]:
    """The settings in a run's name, by a pattern such as w{width}-lr{lr}, which is about as many folders as it names."""
    parts = re.split(r"\{(\w*)\}", pattern)
    fields = parts[1::2]
    named = [name for name in fields if name]
    if not named or len({*named}) < len(named) or not all(map(str.isidentifier, named)):
        raise TransferError(
            f"--names {printable(pattern, 60)}: give settings between braces, each once: w{{width}}-lr{{lr}}"
        )
    expression = re.escape(parts[0])
    for setting, text in zip(fields, parts[2::2], strict=True):
        expression += f"(?P<{setting}>[^/]+?)" if setting else "[^/]*?"
        expression += re.escape(text)
    end = "/".join(name.split("/")[-1 - pattern.count("/") :])
    if not (found := re.fullmatch(expression, end)):
        raise TransferError(f"--names {printable(pattern, 60)}: the run {printable(end, 80)} has another name")
    return found.groupdict()


def _in_name(name: str) -> dict[str, str]:
    """The settings that a run's name spells out, as width=64,lr=0.01 or seed=0_depth=2 do."""
    found = re.findall(
        r"(?:^|[,;&/\s_])([A-Za-z](?:\w*?[A-Za-z0-9])?)=([^,;&/\s=]+?)(?=$|[,;&/\s]|_+[A-Za-z]\w*=)", name
    )
    return dict(found)


def settings_beside(folder: Path) -> dict[str, str]:
    """The settings in the files of a run's folder that tools write them to."""
    settings: dict[str, str] = {}
    for name in SETTINGS:
        path = folder / name
        if path.is_file():
            settings = dict(flat(_read_settings(path))) | settings
    return settings


def _read_settings(path: Path) -> Any:
    """JSON, or YAML as plain text without tags: nothing in it is executed or built."""
    import yaml

    content = read_file(path)
    try:
        return json.loads(content) if path.suffix == ".json" else yaml.load(content, Loader=yaml.BaseLoader)
    except (ValueError, RecursionError, yaml.YAMLError):
        raise TransferError(f"{printable(path)} cannot be read; repair it or take it away") from None


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The plain values in nested settings, by their path, as text; lists are left out. TransferError for too many."""
    left, seen = [(prefix, value, MOST_DEPTH)], 0
    while left:
        name, one, depth = left.pop()
        seen += 1
        if seen > 4 * MOST_ENTRIES:  # also of groups within groups, which YAML can repeat without end
            raise TransferError(f"more than {4 * MOST_ENTRIES:,} settings in one run")
        if isinstance(one, Mapping) and depth:
            inner = [(f"{name}/{key}" if name else str(key), entry, depth - 1) for key, entry in one.items()]
            left += reversed(inner)
        elif name:
            one = one.item() if getattr(one, "shape", None) == () else one  # a number of numpy or torch
            if isinstance(one, bool | int | float | str):
                yield name, cell_of(one)


def cell_of(value: Any) -> str:
    """A plain value as the text of a cell."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else "" if value is None else repr(value)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read_file(path: Path, most: int = SMALL) -> bytes:
    """The content of a log. TransferError if it cannot be read or is too large."""
    try:
        return read_bytes(path, most)
    except OSError as fault:
        raise TransferError(f"{printable(path)}: cannot be read ({fault.strerror})") from None


def json_lines(path: Path, most: int = SMALL) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and record of a file with a JSON object on every line; a torn last line is left out."""
    lines = read_file(path, most).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError
        except (ValueError, RecursionError):
            if number == len(lines) > 1:  # its writer was killed
                return
            raise TransferError(f"{printable(path)} row {number}: no JSON object; give one on each line") from None
        yield number, record


def run_name(folder: Path, root: Path) -> str:
    """How a run is called: its folder as seen from the one that was given."""
    inner = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else folder.name
    return inner if inner != "." else folder.resolve().name
