"""Runs from a foreign CSV: which column means what, what is left out, and bounds on all of it."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedrun_mup.files import SMALL, printable, read_bytes
from speedrun_mup.transfer.axes import RATE, SIZES, Axes, told_sizes
from speedrun_mup.transfer.claims import Doubt
from speedrun_mup.transfer.points import Point, TransferError
from speedrun_mup.transfer.setting_columns import is_setting, judge_settings

OPTIONAL = ("seed", "arm")
# How other programs call them: a name that is or ends with one of these is a candidate.
ALIKE = {
    RATE: ("lr", "learning_rate", "max_lr", "peak_lr", "base_lr", "lr_scale"),
    "loss": ("loss", "nll", "cross_entropy", "perplexity", "ppl", "bpb", "bpc", "bits_per_byte"),
    "arm": ("arm", "parametrization", "parameterization", "method"),
}
MOST_RUNS, MOST_COLUMNS, MOST_BYTES = 200_000, 10_000, SMALL
MOST_NAME, MOST_VALUE = 100, 1000  # characters of an arm, and of a setting
LEAST_VALUE, GREATEST_VALUE = 1e-30, 1e30
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
    path: str | Path, axes: Axes | None = None, columns: Mapping[str, str] | None = None, more: Sequence[str] = ()
) -> RunTable:
    """Runs from a CSV with a column for each of `axes`, loss and, if you like, seed (else one run at every point) and arm
    (else the name of the file).

    Case and empty lines do not matter. A loss of nan, inf or "diverged" marks a diverged run.

    Args:
        path: of the file.
        axes: what was scaled and what was tuned, which is above zero; by default the columns width and lr.
        columns: what the columns are called in the file, for instance {"width": "n_embd", "loss": "val/loss"}.
        more: further sizes that were scaled, each a column: ["n_layer", "tokens"].

    Raises:
        TransferError: in one line that names row (1 is the file's first line) and column.
    """
    path, axes = Path(path), axes or Axes()
    more = [name for name in more if name != axes.size]
    for size in more:
        Axes(size, axes.hyperparameter)  # raises, too
    rows = _rows(path)
    header = next(rows, (1, []))[1]
    place = _find_columns(path, header, axes, columns or {}, more)
    left_out = [number for number in range(len(header)) if number not in place.values()]
    names = [header[number].strip() for number in left_out]
    seen: list[set[str]] = [set() for _ in left_out]
    settings: dict[int, list[tuple[str, Point]]] = {
        number: [] for number in left_out if is_setting(header[number], axes)
    }
    sizes = {name.lower(): number for name, number in zip(names, left_out) if name.lower() in SIZES}
    seeds = Seeds()
    points: dict[tuple[str, tuple[int, ...], float, int], tuple[Point, int]] = {}
    for line, cells in rows:
        where = f"{printable(path)} row {line}"
        if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header) :]):
            raise TransferError(
                f"{where}: {len(cells)} values below a header of {len(header)}; quote a value with a comma"
            )
        told = {role: cells[number].strip() for role, number in place.items()}
        others = {name: int(cells[at]) for name, at in sizes.items() if re.fullmatch(r"\s*[0-9]{1,18}\s*", cells[at])}
        others |= {name: _size(told[name], Axes(name), f"{where}, column {name}") for name in more}
        point = _point(told, others, axes, seeds, where, path.stem)
        key = (point.arm, tuple(point.sizes[name] for name in (axes.size, *more)), point.log2_value, point.seed)
        if key in points:
            same = f"arm {point.arm}, {told_sizes(dict(zip((axes.size, *more), key[1])))}, {axes.hyperparameter} {point.value:g}"
            same += f", seed {point.seed}" * ("seed" in place)
            first = next(cells for number, cells in _rows(path) if number == points[key][1])
            differ = [name for name, number in zip(names, left_out) if first[number].strip() != cells[number].strip()]
            raise TransferError(f"{where}: {same} is there twice{_twice(differ, 'seed' in place)}")
        if len(points) == MOST_RUNS:
            raise TransferError(f"{where}: more than {MOST_RUNS:,} runs; split the table")
        points[key] = point, line
        for values_seen, number in zip(seen, left_out):
            if len(values_seen) <= FEW:
                values_seen.add(cells[number].strip()[:MOST_NAME])
        for number, values in settings.items():
            values.append((cells[number].strip()[:MOST_VALUE], point))
    if not points:
        raise TransferError(f"{printable(path)}: a header but no rows; give one row per finished run")
    doubts, notes = judge_settings([(header[number], values) for number, values in settings.items()], axes)
    notes = [*_left_out(names, seen), *notes, *seeds.notes(), *_units(header[place["loss"]])]
    return RunTable(axes, [point for point, _ in points.values()], tuple(notes), tuple(doubts))


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


def _units(column: str) -> Iterator[str]:
    """A line where the name of the loss says that it is not in nats."""
    if re.search(r"perplexity|ppl|bpb|bpc|bits", column.lower()):
        name = printable(column.strip(), 40)
        yield f"the loss is {name}: what is said in nats, bounds and sigma too, is in its unit; better give its logarithm in nats"


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


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row that is not empty, the header first. What is ambiguous is an error: a quote
    that is not closed swallows rows."""
    try:
        content = read_bytes(path, MOST_BYTES)
    except OSError as fault:
        raise TransferError(f"{printable(path)}: cannot be read ({fault.strerror}); give a CSV file in UTF-8") from None
    if b"\0" in content:
        raise TransferError(f"{printable(path)}: holds NUL bytes; give a CSV file in UTF-8")
    lines = csv.reader(io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig"), strict=True)
    try:
        for cells in lines:
            if any(cell.strip() for cell in cells):
                yield lines.line_num, cells
    except UnicodeDecodeError as fault:
        raise TransferError(f"{printable(path)}: cannot be read ({fault}); give a CSV file in UTF-8") from None
    except csv.Error as fault:
        where = f"{printable(path)} row {lines.line_num}"
        raise TransferError(f"{where}: {fault}; look for a quote that is not closed") from None


# ---------------------------------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------------------------------


def _find_columns(
    path: Path, header: Sequence[str], axes: Axes, columns: Mapping[str, str], more: Sequence[str]
) -> dict[str, int]:
    """role -> number of its column; an axis's role is its name. TransferError for what is missing or ambiguous."""
    if len(header) > MOST_COLUMNS:
        raise TransferError(f"{printable(path)}: {len(header):,} columns; give a table of at most {MOST_COLUMNS:,}")
    names = [name.strip().lower() for name in header]
    shown = printable(",".join(names), 120)
    roles = (axes.size, *more, axes.hyperparameter, "seed", "loss", "arm")
    called = {(axes.hyperparameter if role == RATE else role): name for role, name in columns.items()}
    if unknown := [role for role in called if role not in roles]:
        raise TransferError(
            f"columns {printable(unknown[0], 40)}=...: give {', '.join(roles)}, each the name of a column"
        )
    place, absent = {}, []
    for role in roles:
        name = called.get(role, role).strip().lower()
        found = [number for number, other in enumerate(names) if other == name]
        if len(found) > 1:
            raise TransferError(f"{printable(path)}: more than one column {name!r} in the header ({shown}); drop one")
        if found:
            place[role] = found[0]
        elif role in called:
            raise TransferError(f"{printable(path)}: no column {printable(name, 60)} in the header ({shown})")
        elif role not in OPTIONAL:
            absent.append(role)
    if absent:
        missing = absent if len(names) > 1 else roles[:-1]
        raise TransferError(
            f"{printable(path)}: no column {', '.join(missing)} in the header ({shown}); {_advice(absent, names)}"
        )
    if len(set(place.values())) < len(place):
        raise TransferError(f"{printable(path)}: one column for two meanings; give each of {', '.join(place)} its own")
    return place


def _advice(absent: Sequence[str], names: Sequence[str]) -> str:
    """Which --columns to give instead, as far as names show it."""
    if len(names) <= 1:
        return "separate columns with commas"
    found = {role: _candidates(role, names) for role in absent}
    if not any(found.values()):
        return (
            "name each once, or say what they are called, such as --columns width=n_embd,lr=learning_rate,loss=val/loss"
        )
    given = ",".join(f"{role}={printable(some[0], 60) if some else '...'}" for role, some in found.items())
    choices = [
        f"; {role} may be any of {', '.join(printable(name, 60) for name in some[:6])}"
        for role, some in found.items()
        if len(some) > 1
    ]
    return f"give --columns {given}" + "".join(choices)


def _candidates(role: str, names: Sequence[str]) -> list[str]:
    """Names that may be meant by a role, the likeliest first: validation before training, the shortest before longer ones."""

    def worth(name: str) -> tuple[bool, int]:
        return not re.search("val|eval|test", name), len(name)

    kinds = (role, *SIZES[role].also) if role in SIZES else ALIKE.get(role, (role,))
    plain = {name: re.sub("[^a-z0-9]+", "_", name).strip("_") for name in names if "," not in name and "=" not in name}
    return sorted(
        (name for name, bare in plain.items() if any(bare == kind or bare.endswith(f"_{kind}") for kind in kinds)),
        key=worth,
    )


def _twice(differ: Sequence[str], seeds: bool) -> str:
    """What to do about a second run of one place: the columns that it differs in may be meant for something."""
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
