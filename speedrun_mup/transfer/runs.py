"""The table of runs that a measurement starts from."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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


OTHER_COLUMNS = ("width", "seed", "loss", "arm")
LR = "lr"  # the knob, and its column in a table, unless another hyperparameter is turned


def is_rate(knob: str) -> bool:
    """Whether `knob` names a learning rate, or a factor on some."""
    return knob in (LR, "lr_scale") or knob.endswith("_lr")


def knob_name(knob: str) -> str:
    """What is turned, for a reader: "learning rate" for all that are one, else the hyperparameter's own name."""
    return "learning rate" if is_rate(knob) else knob


def read_runs(path: str | Path, knob: str = LR) -> list[Run]:
    """Runs from a CSV with columns width, lr, seed, loss and, if you like, arm (else the name of the file).

    knob: another column in the place of lr, a hyperparameter above zero; it becomes `Run.lr`. Case, empty lines and other
    columns do not matter. A loss of nan, inf or "diverged" marks a diverged run. Raises TransferError naming row (1 is
    the file's first line) and column.
    """
    runs: dict[tuple[str, int, float, int], Run] = {}
    if knob in OTHER_COLUMNS:
        raise TransferError(f"knob {knob} is a column with another meaning; name that of what was turned, such as lr")
    for where, row in _rows(Path(path), ("width", knob, "seed", "loss")):
        width = _number(row, "width", where, whole=True, positive=True)
        lr = _number(row, knob, where, positive=True)
        seed = _number(row, "seed", where, whole=True)
        loss = math.nan if row["loss"].lower() == "diverged" else _number(row, "loss", where, finite=False)
        run = Run(int(width), lr, int(seed), loss, row.get("arm") or Path(path).stem)
        key = (run.arm, run.width, run.log2_lr, run.seed)
        if key in runs:
            same = f"arm {run.arm}, width {run.width}, {knob} {lr:g}, seed {run.seed}"
            raise TransferError(f"{where}: {same} is there twice; drop one, as all other settings must be the same")
        runs[key] = run
    if not runs:
        raise TransferError(f"{path}: a header but no rows; give one row per finished run")
    return list(runs.values())


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Where it stands and {column: cell} of every row below the header. What is ambiguous is an error: a cell too many,
    as an unquoted decimal comma makes it, moves all that follow, and a quote that is not closed swallows rows."""
    try:
        lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True)
        filled = [(lines.line_num, cells) for cells in lines if any(cell.strip() for cell in cells)]
    except (OSError, UnicodeDecodeError) as fault:
        raise TransferError(f"{path}: cannot be read ({fault}); give a CSV file in UTF-8") from None
    except csv.Error as fault:
        raise TransferError(f"{path} row {lines.line_num}: {fault}; look for a quote that is not closed") from None
    names = [name.strip().lower() for name in filled[0][1]] if filled else []
    missing = [column for column in columns if column not in names]
    if missing:
        separated = "separate columns with commas" if len(names) == 1 else "name each once"
        raise TransferError(f"{path}: no column {', '.join(missing)} in the header ({','.join(names)}); {separated}")
    for column in (*columns, "arm"):
        if names.count(column) > 1:
            raise TransferError(f"{path}: more than one column {column!r} in the header ({','.join(names)}); drop one")
    for number, cells in filled[1:]:
        where = f"{path} row {number}"
        if len(cells) < len(names) or any(cell.strip() for cell in cells[len(names) :]):
            raise TransferError(
                f"{where}: {len(cells)} cells below a header of {len(names)}; quote a cell with a comma"
            )
        yield where, {name: cell.strip() for name, cell in zip(names, cells)}


def _number(
    row: dict[str, str], column: str, where: str, *, whole: bool = False, positive: bool = False, finite: bool = True
) -> float:
    """The number in `column`, or a TransferError that says what should stand there."""
    try:
        value = float(row[column])
        good = not (finite and not math.isfinite(value)) and not (whole and value % 1) and not (positive and value <= 0)
    except ValueError:
        value, good = math.nan, False
    if not good:
        kind = f"a {'positive ' if positive else ''}{'whole ' if whole else ''}number"
        hint = "" if finite else " (write nan or diverged for a run that blew up)"
        raise TransferError(f"{where}, column {column}: {row[column]!r} should be {kind}{hint}")
    return value


def lr_text(log2_lr: float) -> str:
    """A learning rate, or what was turned, for a reader: 2^-1.5 on a grid of quarter octaves, else a plain number."""
    quarters = 4 * log2_lr
    return f"2^{log2_lr:g}" if abs(quarters - round(quarters)) < 1e-5 else f"{2**log2_lr:.3g}"
