"""TensorBoard event files: scalars, and what the HParams plugin holds, without the package.

An event file is a series of records (length, checksum, data, checksum: the TFRecord format); the data are an Event message.
A folder with event files is a run.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from speedrun_mup.files import open_regular, printable
from speedrun_mup.transfer.points import TransferError
from speedrun_mup.transfer.sources.logs import LoggedRun, cell_of, run_name, settings_beside, short_float, text_of
from speedrun_mup.transfer.sources.wire import Damaged, fields, first, text

MOST_RECORD, MOST_BYTES = 256 * 2**20, 4 * 2**30
_STATUS = {2: "failed", 3: "running"}  # of the HParams plugin, where it says that a run has not ended well
_SUMMARY, _STEP = 5, 2  # fields of Event
_FLOAT, _DOUBLE = 1, 2  # types of tensors


def is_events(path: Path) -> bool:
    """Whether a file is an event file, by its name, which TensorBoard goes by too."""
    return "tfevents" in path.name


def read_events(files: Sequence[Path], root: Path) -> Iterator[LoggedRun]:
    """Runs by their folders. Settings that `add_hparams` wrote to a folder inside a run's belong to that run."""
    runs: dict[Path, LoggedRun] = {}
    for path in sorted(files):
        run = runs.setdefault(path.parent, LoggedRun(run_name(path.parent, root), settings_beside(path.parent)))
        for event in _records(path):
            try:
                _log(event, run)
            except Damaged as fault:
                raise TransferError(f"{printable(path)}: a damaged event ({fault}); take the file away") from None
    inner: dict[Path, list[Path]] = defaultdict(list)
    for folder in runs:
        if folder.parent in runs and runs[folder].settings and not runs[folder.parent].settings:
            inner[folder.parent].append(folder)
    for folder, within in inner.items():
        if len(within) == 1:
            part = runs.pop(within[0])
            runs[folder].settings, runs[folder].state = part.settings, part.state or runs[folder].state
            runs[folder].curves = part.curves | runs[folder].curves
    yield from runs.values()


def _records(path: Path) -> Iterator[bytes]:
    """The data of every record; a last one that is cut short, as its writer leaves it when it is killed, is left out."""
    try:
        with open_regular(path) as file:
            if file.seek(0, 2) > MOST_BYTES:
                raise TransferError(f"{printable(path)}: holds more than {MOST_BYTES:,} bytes")
            file.seek(0)
            while len(head := file.read(12)) == 12:
                (length, checksum) = struct.unpack("<QI", head)
                if checksum != _masked_checksum(head[:8]):
                    raise TransferError(f"{printable(path)}: damaged, or no event file")
                if length > MOST_RECORD:
                    raise TransferError(f"{printable(path)}: a record of {length:,} bytes")
                data = file.read(length)
                if len(data) < length or len(file.read(4)) < 4:
                    return
                yield data
    except OSError as fault:
        raise TransferError(f"{printable(path)}: cannot be read ({fault.strerror})") from None


def _log(event: bytes, run: LoggedRun) -> None:
    step = next((value for number, value in fields(event) if number == _STEP and isinstance(value, int)), 0)
    for number, value in fields(first(event, _SUMMARY)):
        if number == 1 and isinstance(value, bytes):  # a value of the summary
            _value(value, step, run)


def _value(message: bytes, step: int, run: LoggedRun) -> None:
    """A scalar, as simple_value or as a tensor without shape, or settings."""
    tag, number, tensor, plugin = "", None, b"", (b"", b"")
    for at, value in fields(message):
        if at == 1:
            tag = text(value)
        elif at == 2 and isinstance(value, float):
            number = short_float(value)
        elif at == 8 and isinstance(value, bytes):
            tensor = value
        elif at == 9 and isinstance(value, bytes):
            data = first(value, 1)
            plugin = first(data, 1), first(data, 2)
    if plugin[0] == b"hparams":
        _hparams(plugin[1], run)
    elif number is None and tensor and plugin[0] == b"scalars":
        number = _scalar(tensor)
    if number is not None and tag:
        run.add(tag, step, number)


def _scalar(tensor: bytes) -> float | None:
    kind, content, listed = 0, b"", None
    for at, value in fields(tensor):
        if at == 1 and isinstance(value, int):
            kind = value
        elif at == 4 and isinstance(value, bytes):
            content = value
        elif at in (5, 6):
            listed = value
    size, code = (4, "<f") if kind == _FLOAT else (8, "<d")
    raw = listed if isinstance(listed, bytes) else content
    if isinstance(listed, float):
        number = listed
    elif kind in (_FLOAT, _DOUBLE) and len(raw) == size:
        number = struct.unpack(code, raw)[0]
    else:
        return None
    return short_float(number) if kind == _FLOAT else number


def _hparams(content: bytes, run: LoggedRun) -> None:
    """Settings and status of a run: HParamsPluginData, whose settings are a map of names to google.protobuf.Value."""
    for at, entry in fields(first(content, 3)):
        if at == 1 and isinstance(entry, bytes):
            name = text(first(entry, 1))
            for kind, value in fields(first(entry, 2)):
                if kind == 2 and isinstance(value, float):
                    run.settings[name] = text_of(value)
                elif kind == 3:
                    run.settings[name] = text(value)
                elif kind == 4:
                    run.settings[name] = cell_of(bool(value))
    for at, value in fields(first(content, 4)):
        if at == 1 and isinstance(value, int):
            run.state = _STATUS.get(value, "")


def _masked_checksum(data: bytes) -> int:
    """CRC-32C (Castagnoli), rotated and shifted as TFRecord stores it. Of lengths only: over all data it would take minutes."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum ^= byte
        for _ in range(8):
            checksum = (checksum >> 1) ^ (0x82F63B78 if checksum & 1 else 0)
    checksum ^= 0xFFFFFFFF
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF
