"""Tables as text: CSV in every dialect, read exactly or refused.

Separators are commas, semicolons, tabs or bars; the decimal mark is a point or a comma, which the whole table must share.
What may be either a decimal mark or a separator of thousands is refused.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from speedrun_mup.files import SMALL, printable, read_bytes
from speedrun_mup.transfer.points import TransferError
from speedrun_mup.transfer.sources.logs import Rows

SEPARATORS = (",", ";", "\t", "|")
_WITH_COMMA = re.compile(r"[+-]?(?:\d+,\d+|,\d+)(?:[eE][+-]?\d+)?%?")
_OF_THREE = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}%?")  # a decimal comma, or one between thousands
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?P<mark>[.,' ])\d{3}(?:(?P=mark)\d{3}|[.,]\d)\S*|(?P<space>['  ])\d{3})")
_OPTUNA = {"number", "value", "state"}  # columns of Study.trials_dataframe(), next to params_NAME


class TextRows(Rows):
    """The rows of a CSV file, parsed again whenever they are gone through."""

    def __init__(self, path: Path, most: int = SMALL):
        self._path, self._text, self._lines_before = path, *_decoded(path, most)
        self._separator = _separator(self._text, path)
        self._comma, self._percent = False, frozenset[int]()
        header = next(self._parsed(), (1, []))[1]
        optuna = {name.strip().lower() for name in header} >= _OPTUNA and any("params_" in name for name in header)
        also = {"loss": ("value",)} if optuna else {}
        super().__init__("a table of Optuna trials" if optuna else "a table", header, self, also=also)

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        """Where a row is, and its cells, with numbers as Python writes them."""
        rows = self._parsed()
        next(rows, None)
        for line, cells in rows:
            yield f"{printable(self._path)} row {line}", self._plain(cells)

    def _plain(self, cells: list[str]) -> list[str]:
        cells = [_unquoted(cell) for cell in cells]
        if self._comma:
            cells = [cell.replace(",", ".") if _WITH_COMMA.fullmatch(cell) else cell for cell in cells]
        for number in self._percent:
            if number < len(cells) and (found := re.fullmatch(r"(\S+?)\s*%", cells[number])):
                cells[number] = _hundredth(found[1])
        return cells

    def settle(self, numbers: Mapping[str, int]) -> list[str]:
        """See Rows: which decimal mark this table has, and which columns are in percent."""
        points, commas, unclear = "", "", ""
        percent: dict[str, set[bool]] = {role: set() for role in numbers}
        for where, cells in self:
            for role, number in numbers.items():
                cell = cells[number] if number < len(cells) else ""
                if found := _THOUSANDS.fullmatch(cell):
                    plain = cell.replace(found["mark"] or found["space"], "")
                    raise TransferError(f"{where}, column {role}: {cell!r} has a separator of thousands; write {plain}")
                if re.match(r"[+-]?[\d.,]", cell):
                    percent[role].add(cell.endswith("%"))
                told = f"{where}, column {role}: {cell!r}"
                if _OF_THREE.fullmatch(cell):
                    unclear = unclear or told
                elif _WITH_COMMA.fullmatch(cell):
                    commas = commas or told
                elif re.search(r"\d\.\d", cell):
                    points = points or told
        if (commas or unclear) and points:
            raise TransferError(f"{commas or unclear} has a comma and {points} has a point; write all with a point")
        if unclear and not commas:
            both = "may have a decimal comma or a separator of thousands"
            raise TransferError(f"{unclear} {both}; write 1.234 or 1234, as it is meant")
        for role, kinds in percent.items():
            if len(kinds) > 1:
                raise TransferError(
                    f"{printable(self._path)}, column {role}: some values are in percent; write all alike"
                )
        self._comma = bool(commas)
        self._percent = frozenset(numbers[role] for role, kinds in percent.items() if True in kinds)
        notes = ["numbers have a decimal comma"] if self._comma else []
        return notes + [f"{role} is in percent: 1 % is 0.01" for role, kinds in percent.items() if True in kinds]

    def _parsed(self) -> Iterator[tuple[int, list[str]]]:
        """Line number and cells of every row that is not empty, the header first. What is ambiguous is an error: a quote
        that is not closed swallows rows."""
        lines = csv.reader(io.StringIO(self._text, newline=""), strict=True, delimiter=self._separator)
        try:
            for cells in lines:
                if any(cell.strip() for cell in cells):
                    yield lines.line_num + self._lines_before, cells
        except csv.Error as fault:
            where = f"{printable(self._path)} row {lines.line_num + self._lines_before}"
            raise TransferError(f"{where}: {fault}; look for a quote that is not closed") from None


def _unquoted(cell: str) -> str:
    """A cell without space around it, and a number without the quotes that were written into it."""
    cell = cell.strip()
    quoted = re.fullmatch(r"=?([\"'])([+-]?[\d.,][\d.,eE+-]*%?)\1", cell)
    return quoted[2] if quoted else cell


def _hundredth(text: str) -> str:
    try:
        return f"{float(text) / 100:.15g}"
    except ValueError:
        return text  # which is refused where it is read


def _decoded(path: Path, most: int) -> tuple[str, int]:
    """The text of a file, and how many lines before its header are left out: UTF-8, or UTF-16 with its mark, as Excel writes."""
    advice = "give a CSV file in UTF-8"
    try:
        content = read_bytes(path, most)
        marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except OSError as fault:
        raise TransferError(f"{printable(path)}: cannot be read ({fault.strerror}); {advice}") from None
    except UnicodeDecodeError as fault:
        raise TransferError(f"{printable(path)}: cannot be read ({fault}); {advice}") from None
    if "\0" in text:
        raise TransferError(f"{printable(path)}: holds NUL bytes; {advice}")
    if re.match(r"sep=.\r?\n", text):  # Excel's
        return text.split("\n", 1)[1], 1
    return text, 0


def _separator(text: str, path: Path) -> str:
    """What separates the names of the header: whatever gives most of them."""
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    counts = {}
    for separator in SEPARATORS:
        try:
            counts[separator] = len(next(csv.reader([first], delimiter=separator), []))
        except csv.Error:
            counts[separator] = 0
    return max(SEPARATORS, key=lambda separator: counts[separator])
