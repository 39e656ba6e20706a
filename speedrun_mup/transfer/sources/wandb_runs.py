"""Offline runs of W&B: wandb/offline-run-*/run-*.wandb, without the package.

Such a file is a log in LevelDB's format, blocks of 32 KiB with records in one or several pieces; a record is a message of
wandb_internal.proto, in which values are JSON.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from speedrun_mup.files import printable
from speedrun_mup.transfer.points import TransferError
from speedrun_mup.transfer.sources.logs import LoggedRun, flat, read_file, run_name
from speedrun_mup.transfer.sources.wire import Damaged, fields, first, text

MAGIC = b":W&B"
BLOCK, HEAD, MOST_BYTES = 32 * 2**10, 7, 2**30
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_HISTORY, _CONFIG, _RUN, _EXIT = 2, 5, 17, 18  # fields of Record
_JSON = 16  # field of an item


def is_wandb(path: Path) -> bool:
    """Whether a file is the log of a W&B run."""
    return path.suffix == ".wandb"


def read_wandb(files: Sequence[Path], root: Path) -> Iterator[LoggedRun]:
    """Runs by their files; a run is called as W&B shows it, else as its folder."""
    for path in files:
        run = LoggedRun(run_name(path.parent, root), state="running")  # until the log says how it ended
        try:
            for record in _records(path):
                _note(record, run)
        except Damaged as fault:
            raise TransferError(f"{printable(path)}: damaged ({fault}); export the runs as CSV instead") from None
        run.settings = {name: value for name, value in run.settings.items() if not name.startswith("_wandb")}
        yield run


def _records(path: Path) -> Iterator[bytes]:
    """The records of a log; a last one that is cut short is left out."""
    content = read_file(path, MOST_BYTES)
    if not content.startswith(MAGIC):
        raise Damaged("no W&B log")
    at, pieces = HEAD, list[bytes]()
    while at + HEAD <= len(content):
        left = BLOCK - at % BLOCK
        if left < HEAD:
            at += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, at)
        data = content[at + HEAD : at + HEAD + length]
        if len(data) < length or (kind == 0 and length == 0):
            return
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or checksum != zlib.crc32(bytes([kind]) + data):
            raise Damaged("a wrong checksum")
        at += HEAD + length
        if kind in (_FULL, _FIRST):
            pieces = []
        pieces.append(data)
        if kind in (_FULL, _LAST):
            yield b"".join(pieces)


def _note(record: bytes, run: LoggedRun) -> None:
    for number, value in fields(record):
        if number == _HISTORY and isinstance(value, bytes):
            values = dict(_items(value, 1))
            step = next((n for at, n in fields(first(value, 2)) if at == 1), values.get("_step", 0))
            for name, entry in values.items():
                for inner, cell in flat({name: entry}):
                    if not name.startswith("_") and (found := _number(cell)) is not None:
                        run.add(inner, float(step), found)
        elif number == _CONFIG and isinstance(value, bytes):
            run.settings |= dict(flat(dict(_items(value, 1))))
        elif number == _RUN and isinstance(value, bytes):
            run.name = text(first(value, 8)) or run.name
            run.settings |= dict(flat(dict(_items(first(value, 4), 1))))
        elif number == _EXIT and isinstance(value, bytes):
            code = next((n for at, n in fields(value) if at == 1), 0)
            run.state = "finished" if code == 0 else "failed"


def _items(message: bytes, number: int) -> Iterator[tuple[str, Any]]:
    """Name and value of the items of a history or a config; a nested name has "/" between."""
    for at, item in fields(message):
        if at == number and isinstance(item, bytes):
            names, value = list[str](), None
            for kind, part in fields(item):
                if kind in (1, 2) and part:
                    names.append(text(part))
                elif kind == _JSON:
                    try:
                        value = json.loads(text(part))
                    except (ValueError, RecursionError):
                        value = None
            yield "/".join(names), value


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
