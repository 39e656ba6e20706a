"""Tables as JSON: an object on every line, or one list of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speedrun_mup.files import printable, read_json
from speedrun_mup.transfer.points import TransferError
from speedrun_mup.transfer.sources.logs import Rows, flat, json_lines


def read_json_table(path: Path, listed: bool, most: int) -> Rows:
    """A table with an object for each run, on its line or in one list. Nested names have "/" between."""
    if listed:
        entries = read_json(path, "give a JSON object on each line, or one list of them", TransferError, most)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise TransferError(f"{printable(path)}: no list of JSON objects; give one object for each run")
        records = [(f"{printable(path)} entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    else:
        records = [(f"{printable(path)} row {line}", record) for line, record in json_lines(path, most)]
    return rows_of_records(records, "JSON")


def rows_of_records(records: Sequence[tuple[str, Mapping[str, Any]]], words: str) -> Rows:
    """Rows of named values, wherever they are from; a value that is not there is an empty cell."""
    flattened = [(where, dict(flat(record))) for where, record in records]
    header = list(dict.fromkeys(name for _, cells in flattened for name in cells))
    rows: Iterable[tuple[str, list[str]]] = [
        (where, [cells.get(name, "") for name in header]) for where, cells in flattened
    ]
    return Rows(words, header, rows)
