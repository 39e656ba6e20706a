"""Runs from tables and logs of any program: from cells to points, what is left out, and bounds on all of it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from speedrun_mup.files import SMALL, printable
from speedrun_mup.transfer.axes import RATE, SIZES, Axes, told_sizes
from speedrun_mup.transfer.claims import NAMED, Doubt
from speedrun_mup.transfer.columns import find_columns, step_column, units
from speedrun_mup.transfer.points import Point, TransferError
from speedrun_mup.transfer.setting_columns import is_setting, judge_settings
from speedrun_mup.transfer.sources import read_source
from speedrun_mup.transfer.sources.json_lines import rows_of_records
from speedrun_mup.transfer.sources.logs import MIN, Curve, Rows, text_of

MOST_RUNS, MOST_BYTES = 200_000, SMALL
MOST_NAME, MOST_VALUE = 100, 1000  # characters of an arm, and of a setting
LEAST_VALUE, GREATEST_VALUE = 1e-30, 1e30
STATES = ("state", "status")  # columns that say how a run ended
UNFINISHED = frozenset(
    ("running", "pending", "queued", "waiting", "crashed", "failed", "fail", "failure", "error", "killed", "stopped")
    + ("pruned", "preempted", "preempting", "canceled", "cancelled", "aborted")
)
DIVERGED = ("nan", "inf", "-inf", "infinity", "-infinity", "diverged")
FEW = 8  # values of a column that is left out which are worth telling


# Runs in whatever form: a path, a pandas table (which is Any here), or rows.
Table = str | Path | Iterable[Point | Mapping[str, Any]] | Any


@dataclass(frozen=True)
class RunTable:
    """What a file holds. notes: what was left out; doubts: see `claims`."""

    axes: Axes
    points: list[Point]
    notes: tuple[str, ...]
    doubts: tuple[Doubt, ...]


def read_points(
    path: str | Path, axes: Axes | None = None, columns: Mapping[str, str] | None = None, more: Sequence[str] = ()
) -> list[Point]:
    """The runs of `read_table`."""
    return read_table(path, axes, columns, more).points


def read_table(
    path: str | Path,
    axes: Axes | None = None,
    columns: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
    *,
    loss: str = "",
    names: str = "",
    form: str = "",
) -> RunTable:
    """Runs from a table, or from logs of other programs (`sources.FORMATS`), with a column for each of `axes`, loss and, if
    you like, seed (else one run at every point) and arm (else the name of the file).

    Case and empty lines do not matter. A loss of nan, inf or "diverged" marks a diverged run. Notes say which columns were
    taken that are called otherwise. Runs that have not ended, and logged ones without a loss, are a doubt.

    Args:
        path: of the file or folder.
        axes: what was scaled and what was tuned, which is above zero; by default the columns width and lr.
        columns: what the columns are called in the file, for instance {"width": "n_embd", "loss": "val/loss"}.
        more: further sizes that were scaled, each a column: ["n_layer", "tokens"].
        loss: what stands for a run, "last" or "min" of its curve; a table with a row for each step needs it.
        names: pattern of the names of logged runs, such as w{width}-lr{lr}.
        form: one of `sources.FORMATS`, where a folder has several.

    Raises:
        TransferError: in one line that names row (1 is the file's first line) or run, and column.
    """
    rows = read_source(Path(path), loss, names, form, MOST_BYTES)
    return read_rows(rows, Path(path), axes, columns, more, loss)


def read_rows(
    rows: Rows,
    path: Path,
    axes: Axes | None = None,
    columns: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
    loss: str = "",
) -> RunTable:
    """The same for rows wherever they are from. path: what messages call them, and where the arm has its name from."""
    axes = axes or Axes()
    more = [name for name in more if name != axes.size]
    for size in more:
        Axes(size, axes.hyperparameter)  # raises, too
    reader = _Reader(rows, path, axes, columns or {}, more, loss)
    for where, cells in rows.rows:
        reader.take(where, cells)
    return reader.table()


_Key = tuple[str, tuple[int, ...], float, int]  # arm, sizes, log2 of the hyperparameter, seed


class _Reader:
    """A table while it is read, row by row."""

    def __init__(self, rows: Rows, path: Path, axes: Axes, columns: Mapping[str, str], more: Sequence[str], loss: str):
        self.rows, self.path, self.axes, self.more, self.which = rows, path, axes, more, loss
        found = find_columns(path, rows, axes, columns, more)
        self.place = {role: number for role, number in found.place.items() if role != "step"}
        self.step = step_column(rows, columns) if rows.curves is None else None
        if loss and rows.curves is None and self.step is None:
            raise TransferError(f"--loss {loss}: {printable(path)} has no column of steps, so no curves; leave it out")
        by_step = {self.step} if loss else set()
        unused = [n for n in range(len(rows.header)) if n not in {*self.place.values()} | by_step]
        self.left_out = [n for n in unused if rows.curves is None or n not in rows.curves]
        self.state = next((n for n in self.left_out if rows.header[n].strip().lower() in STATES), None)
        self.settings: dict[int, list[tuple[str, Point]]] = {
            n: [] for n in self.left_out if is_setting(rows.header[n], axes)
        }
        names = {n: rows.header[n].strip().lower() for n in self.left_out}
        self.sizes = {name: n for n, name in names.items() if name in SIZES}
        self.seen: dict[int, set[str]] = {n: set() for n in self.left_out}
        numbers = {role: n for role, n in self.place.items() if role not in ("seed", "arm")}
        self.notes = [*rows.notes, *found.notes, *rows.settle(numbers)]
        self.seeds, self.points = Seeds(), dict[_Key, tuple[Point, str]]()
        self.curves: dict[_Key, dict[float, float]] = {}
        self.absent: dict[str, None] = {}  # what is known of runs that do not count

    def take(self, where: str, cells: list[str]) -> None:
        """Add a row."""
        header = self.rows.header
        if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
            raise TransferError(
                f"{where}: {len(cells)} values below a header of {len(header)}; quote a value with a comma"
            )
        told = {role: cells[number].strip() for role, number in self.place.items()}
        state = cells[self.state].strip().lower() if self.state is not None else ""
        by_step = bool(self.which) and self.step is not None
        if (by_step or self.rows.curves is not None) and not told["loss"]:
            if not by_step:
                self.absent[f"{self._short(where)} has no {header[self.place['loss']]}"] = None
            return
        if state in UNFINISHED and told["loss"].lower() not in DIVERGED:
            self.absent[f"{self._short(where)} is {state}"] = None
            return
        others = {name: int(cells[n]) for name, n in self.sizes.items() if re.fullmatch(r"\s*[0-9]{1,18}\s*", cells[n])}
        others |= {name: _size(told[name], Axes(name), f"{where}, column {name}") for name in self.more}
        point = _point(told, others, self.axes, self.seeds, where, self.path.stem)
        sizes = tuple(point.sizes[name] for name in (self.axes.size, *self.more))
        key = (point.arm, sizes, point.log2_value, point.seed)
        if by_step and self.step is not None:
            at = _to_number(cells[self.step].strip(), f"{where}, column {header[self.step]}", "a number")
            if at in self.curves.setdefault(key, {}):
                self._refuse(key, point, where, cells)
            self.curves[key][at] = point.loss
            if key in self.points:
                return
        elif key in self.points:
            self._refuse(key, point, where, cells)
        if len(self.points) == MOST_RUNS:
            raise TransferError(f"{where}: more than {MOST_RUNS:,} runs; split the table")
        self.points[key] = point, where
        for number, values_seen in self.seen.items():
            if len(values_seen) <= FEW:
                values_seen.add(cells[number].strip()[:MOST_NAME])
        for number, values in self.settings.items():
            values.append((cells[number].strip()[:MOST_VALUE], point))

    def _short(self, where: str) -> str:
        """Where a row is, without the file."""
        return where.removeprefix(printable(self.path)).lstrip(": ")

    def _refuse(self, key: _Key, point: Point, where: str, cells: list[str]) -> NoReturn:
        """Raises TransferError for a second run at one place."""
        names = told_sizes(dict(zip((self.axes.size, *self.more), key[1])))
        same = f"arm {point.arm}, {names}, {self.axes.hyperparameter} {point.value:g}"
        same += f", seed {point.seed}" * ("seed" in self.place)
        first = next(other for at, other in self.rows.rows if at == self.points[key][1])
        differ = [self.rows.header[n].strip() for n in self.left_out if first[n].strip() != cells[n].strip()]
        steps = self.rows.header[self.step].strip() if self.step is not None and not self.which else ""
        what = _twice(differ, "seed" in self.place, steps)
        if not differ and self.rows.curves is not None and "seed" not in self.place:
            what = "; if their names hold the seed, give the pattern of these, such as --names w{width}-lr{lr}-s{seed}"
        raise TransferError(f"{where}: {same} is there twice{what}")

    def table(self) -> RunTable:
        """All that was read, with what is doubtful about it."""
        if not self.points and self.absent:
            raise TransferError(f"{printable(self.path)}: no run counts; {_some(self.absent)}")
        if not self.points:
            raise TransferError(f"{printable(self.path)}: a header but no rows; give one row per finished run")
        points = [point for point, _ in self.points.values()]
        columns = [(self.rows.header[number], values) for number, values in self.settings.items()]
        if self.curves:
            ends = {key: Curve.of(sorted(curve.items())) for key, curve in self.curves.items()}
            points = [replace(point, loss=ends[key].loss(self.which)) for key, (point, _) in self.points.items()]
            columns.append(("steps", [(text_of(end.step), point) for end, point in zip(ends.values(), points)]))
            self.notes.append(f"the loss of a run is its {'lowest' if self.which == MIN else 'last'} value")
        doubts, notes = judge_settings(columns, self.axes)
        if self.absent:
            count = f"{len(self.absent)} of {len(self.absent) + len(points)} runs do not count"
            doubts.insert(0, Doubt("missing", f"{count}: {_some(self.absent)}; finish them, or --accept missing"))
        left_out = [*_left_out([self.rows.header[n].strip() for n in self.left_out], [*self.seen.values()])]
        notes = [*self.notes, *left_out, *notes, *self.seeds.notes(), *units(self.rows.header[self.place["loss"]])]
        return RunTable(self.axes, points, tuple(notes), tuple(doubts))


def _some(names: Collection[str]) -> str:
    shown = ", ".join(printable(name, 100) for name in [*names][:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def read_any(
    table: Table,
    axes: Axes,
    columns: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
    *,
    loss: str = "",
    names: str = "",
    form: str = "",
) -> RunTable:
    """`read_table` for runs in whatever form: a path, a pandas table, rows as mappings, or runs as they are."""
    if isinstance(table, str | Path):
        return read_table(table, axes, columns, more, loss=loss, names=names, form=form)
    if names or form:
        raise TransferError("names and form are for logs; leave them out for a table that is in memory")
    rows = table.to_dict("records") if hasattr(table, "to_dict") else list(table)
    if rows and all(isinstance(row, Point) for row in rows):
        return RunTable(axes, list(rows), (), ())
    if not all(isinstance(row, Mapping) for row in rows):
        raise TransferError(
            "runs: give a path, a pandas table, or rows that are mappings: {'width': 64, 'lr': 0.01, 'loss': 3}"
        )
    records = [(f"row {number}", row) for number, row in enumerate(rows, start=1)]
    return read_rows(rows_of_records(records, "a table"), Path("runs"), axes, columns, more, loss)


def points_in(table: Table, sizes: Sequence[str], hyperparameter: str = RATE) -> list[Point]:
    """The runs in a table in whatever form: a path, rows as mappings, a pandas table, or runs as they are.

    Raises TransferError that names the row, the first is 1, and the column.
    """
    if isinstance(table, (str, Path)):
        return read_table(table, Axes(sizes[0] if sizes else "width", hyperparameter), None, sizes[1:]).points
    rows = table.to_dict("records") if hasattr(table, "to_dict") else table
    return [
        row if isinstance(row, Point) else _of_row(row, sizes, hyperparameter, f"row {number}")
        for number, row in enumerate(rows, start=1)
    ]


def _of_row(row: Mapping[str, Any], sizes: Sequence[str], hyperparameter: str, where: str) -> Point:
    if absent := [name for name in (*sizes, hyperparameter, "loss") if name not in row]:
        raise TransferError(f"{where}: no {absent[0]}; give {', '.join((*sizes, hyperparameter, 'loss'))}")
    numbers = {}
    for name in (*sizes, hyperparameter, "loss", *(["seed"] if "seed" in row else [])):
        try:
            numbers[name] = float(row[name])
        except (TypeError, ValueError):
            raise TransferError(f"{where}, {name}: {printable(str(row[name]), 40)!r} is no number") from None
    for name in sizes:
        if not (numbers[name] >= 1 and numbers[name] == int(numbers[name])):
            raise TransferError(f"{where}, {name}: {numbers[name]} is no whole number above zero")
    if not LEAST_VALUE <= numbers[hyperparameter] <= GREATEST_VALUE:
        raise TransferError(f"{where}, {hyperparameter}: {numbers[hyperparameter]} is not above zero and finite")
    where_it_lies = {name: int(row[name]) for name in sizes}
    arm, seed = str(row.get("arm", "runs")), int(numbers.get("seed", 0))
    return Point(where_it_lies, numbers[hyperparameter], seed, numbers["loss"], arm)


class Seeds:
    """The seeds of a table: whole numbers, or names that are counted as they come."""

    def __init__(self) -> None:
        self._names: dict[str, int] | None = None  # None until the first seed says what they are

    def number(self, text: str, where: str) -> int:
        """Of the seed in a cell. Raises TransferError for a name among numbers, and for a number among names."""
        first, named = self._names is None, _is_name(text)
        if first:
            self._names = {}
        if self._names is not None and named and (first or self._names):
            return self._names.setdefault(text, len(self._names))
        if self._names:
            raise TransferError(f"{where}: {printable(text, 40)!r} should be a name, as the seeds above are")
        return _whole(text, where)

    def notes(self) -> Iterator[str]:
        """A line that says which name became which number."""
        if self._names:
            told = [f"{number} is {printable(name, 40)}" for name, number in self._names.items()]
            yield f"seeds have names: {', '.join(told[:FEW])}" + (" and more" if len(told) > FEW else "")


def _is_name(text: str) -> bool:
    """Whether a seed is no number, nor one with a fault, but has a letter and can be printed."""
    try:
        float(text)
    except ValueError:
        return bool(re.search("[A-Za-z]", text)) and text == printable(text, MOST_NAME)
    return False


def _point(
    cells: Mapping[str, str], others: Mapping[str, int], axes: Axes, seeds: Seeds, where: str, default_arm: str
) -> Point:
    """A row's run. cells: role -> text; others: its sizes on axes that are not measured."""
    at, tuned = f"{where}, column {axes.size}", f"{where}, column {axes.hyperparameter}"
    size = _size(cells[axes.size], axes, at)
    value = _to_number(cells[axes.hyperparameter], tuned, "a positive number")
    if not value > 0:
        raise TransferError(f"{tuned}: {printable(cells[axes.hyperparameter], 40)!r} should be a positive number")
    if not LEAST_VALUE <= value <= GREATEST_VALUE:
        raise TransferError(f"{tuned}: {value:g} should be from {LEAST_VALUE:g} to {GREATEST_VALUE:g}")
    seed = seeds.number(cells["seed"], f"{where}, column seed") if "seed" in cells else 0
    hint = "a number (write nan or diverged for a run that blew up)"
    lost = cells["loss"].lower() == "diverged"
    loss = math.nan if lost else _to_number(cells["loss"], f"{where}, column loss", hint, finite=False)
    arm = cells.get("arm") or printable(default_arm, MOST_NAME)
    if arm != printable(arm, MOST_NAME):
        kind = f"a name of at most {MOST_NAME} characters, none of them a control character"
        raise TransferError(f"{where}, column arm: {printable(arm, 40)!r} should be {kind}")
    return Point({**others, axes.size: size}, value, seed, loss, arm)


def _size(text: str, axes: Axes, where: str) -> int:
    size = _whole(text, where, positive=True)
    if size > axes.scale.most:
        raise TransferError(f"{where}: {size:.3g} should be at most {axes.scale.most}")
    return size


def _to_number(text: str, where: str, kind: str, *, finite: bool = True) -> float:
    """The number in a cell, or a TransferError that says what should stand there."""
    try:
        value = float(text) if "_" not in text else math.inf
        good = "_" not in text and (math.isfinite(value) or not finite)
    except ValueError:
        value, good = math.nan, False
    if not good:
        raise TransferError(f"{where}: {printable(text, 40)!r} should be {kind}")
    return value


def _whole(text: str, where: str, positive: bool = False) -> int:
    """The whole number in a cell, to the last digit, as 2**53 and 2**53 + 1 are one float."""
    kind = f"a {'positive ' if positive else ''}whole number"
    exact = re.fullmatch(r"[+-]?[0-9]{1,40}", text)
    number = int(text) if exact else _to_number(text, where, kind)
    if number != int(number) or (positive and number <= 0) or (not exact and abs(number) >= 2**53):
        raise TransferError(f"{where}: {printable(text, 40)!r} should be {kind}")
    return int(number)


def _twice(differ: Sequence[str], seeds: bool, steps: str = "") -> str:
    """What to do about a second run of one place: the columns that it differs in may be meant for something. steps: the
    column that may count the steps of one run."""
    if steps in differ:
        return f", and differs in {printable(steps, 40)}: if these are steps of one run, say what counts with --loss last or min"
    if not differ:
        return "; drop one, as all other settings must be the same"
    names = ", ".join(printable(name, 40) for name in differ[:6]) + (" and others" if len(differ) > 6 else "")
    arm = f"--columns arm={printable(differ[0], 40)}"
    or_seed = "" if seeds else ", or say which column is the seed with --columns seed=NAME"
    return f", and differs in {names}: keep the rows with one value, or make it the arm with {arm}{or_seed}"


def _left_out(names: Sequence[str], seen: Sequence[set[str]]) -> Iterator[str]:
    """One line on the columns that were not used, and on those of them that take a few values, as a setting does."""
    if names:
        listed = ", ".join(printable(name, 40) or "(no name)" for name in names[:12])
        text = f"columns not used: {listed}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        vary = [(name, some) for name, some in zip(names, seen) if 1 < len(some) <= FEW]
        told = [f"{printable(name, 40)} ({', '.join(_quoted(value) for value in sorted(some))})" for name, some in vary]
        if told:
            more = " and others differ" if len(told) > 4 else " differs" if len(told) == 1 else " differ"
            text += f". {', '.join(told[:4])}{more} between runs: harmless if it is only a comment"
        yield text


def _quoted(value: str) -> str:
    """A value of the table between quotes, so that an empty one shows."""
    return f'"{printable(value, 40)}"'
