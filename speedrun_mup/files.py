"""Small files and names from outside: written whole, read with bounds, printed without control characters; folder locks.

Every file that this package replaces is written by `whole_file`, every one that it extends is opened by `open_to_append`,
and every small file that it did not just write itself is opened by `open_regular`. All raise OSError with a `strerror`
that says what is wrong; `write_whole` and `read_json` turn it into one line for the user.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from speedrun_mup.core.errors import ConfigError, UserError

SMALL = 64 * 2**20  # bytes; more than any settings, manifest or result of one run

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISLNK, "a symbolic link"),
)
# Control characters, surrogates, line separators, and the marks that reorder text (Unicode's bidirectional controls).
_UNPRINTABLE = r"\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_NAME, _TEXT = re.compile(f"[{_UNPRINTABLE}]"), re.compile(rf"(?![\t\n\r])[{_UNPRINTABLE}]")


def printable(name: object, most: int = 200) -> str:
    """A name or a piece of text from outside, fit for one line of a terminal.

    Args:
        name: anything; `str` of it is shown.
        most: characters to keep; the rest becomes "...".

    Returns:
        The text with control characters, line ends and marks of direction as escapes such as ``\\x1b``.
    """
    text = _NAME.sub(_escape, str(name)[: 4 * most])
    return text if len(text) <= most else text[: most - 3] + "..."


def without_escapes(text: str) -> str:
    """Text of several lines in which terminal escape sequences have become visible; tabs and line ends stay."""
    return _TEXT.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("ascii", "backslashreplace").decode() if ord(found[0]) > 127 else f"\\x{ord(found[0]):02x}"


def kind_of(mode: int) -> str:
    """The name of the kind of file that a `stat` mode stands for."""
    return next((words for is_it, words in _KINDS if is_it(mode)), "a regular file")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file to read; a FIFO, socket, device or folder in its place is an OSError, never a wait."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, not a regular file", str(path))
    return open(descriptor, "rb")


def read_bytes(path: Path, most: int = SMALL) -> bytes:
    """The content of a regular file of up to `most` bytes. OSError for anything else."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it holds more than {most:,} bytes", str(path))
    return content


def read_text(path: Path, most: int = SMALL) -> str:
    """The same as UTF-8 text; what is not UTF-8 becomes replacement characters."""
    return read_bytes(path, most).decode(errors="replace")


def read_json(path: Path, advice: str, error: type[UserError] = ConfigError, most: int = SMALL) -> Any:
    """The value in a JSON file that may come from outside.

    Args:
        path: of a regular file.
        advice: how to fix it, the end of the one-line message.
        error: what is raised for a file that cannot be read or is not JSON.
        most: bytes.
    """
    import json

    try:
        return json.loads(read_bytes(path, most))
    except OSError as fault:
        raise error(f"{printable(path)} cannot be read ({fault.strerror}); {advice}") from None
    except (ValueError, RecursionError):
        raise error(f"{printable(path)} is not JSON; {advice}") from None


def strict_json(value: Any, indent: int | None = None, digits: int | None = None) -> str:
    """Anything that JSON has a word for, as strict JSON: what is not a finite number becomes null.

    Args:
        value: dicts, sequences, arrays, enums, numbers, text; nested.
        indent: spaces of a level; None puts all on one line, without spaces if `digits` are given.
        digits: significant ones of a float; None keeps all.
    """
    separators = (",", ":") if digits else None
    return json.dumps(_finite(value, digits), indent=indent, separators=separators, allow_nan=False)


def _finite(value: Any, digits: int | None) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _finite(entry, digits) for key, entry in value.items()}
    if hasattr(value, "tolist"):  # an array of numpy or torch
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(entry, digits) for entry in value]
    if isinstance(value, float):
        return (float(f"{value:.{digits}g}") if digits else value) if math.isfinite(value) else None
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def refuse_device(path: Path) -> None:
    """OSError if a device has the name of a file that is about to be written."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise OSError(errno.EINVAL, "it is a device, not a regular file", str(path))


def new_file(path: Path) -> BinaryIO:
    """Open a new file to write; a file, a link or a FIFO in its place goes away. OSError for a folder or a device."""
    refuse_device(path)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to fill that takes the place of `path` when the block ends, and vanishes if the block raises.

    Killed at any instant, or with the power cut, this leaves the old file or the new one: the content is on the disk
    before the rename, and the rename before this returns. A link in the place of `path` is replaced, not followed; a device
    is an OSError, since root could replace it and take it from the whole machine.
    """
    refuse_device(path)
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with new_file(part) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as fault:
        with contextlib.suppress(OSError):
            part.unlink()
        _rename_fault(fault, part, path)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that gets the name `path`, which is free, when the block ends, and vanishes if the block raises."""
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        part.mkdir(parents=True)
        yield part
        sync_folder(part)
        os.rename(part, path)
        sync_folder(path.parent)
    except BaseException as fault:
        shutil.rmtree(part, ignore_errors=True)
        _rename_fault(fault, part, path)
        raise


def _rename_fault(fault: BaseException, part: Path, path: Path) -> None:
    """Let an OSError about something that has a name for the time of writing speak of what it was to become."""
    if isinstance(fault, OSError) and str(fault.filename or "").startswith(str(part)):
        fault.filename = str(path) + str(fault.filename)[len(str(part)) :]


def write_whole(
    path: Path,
    content: str | bytes | Sequence[bytes | memoryview],
    advice: str = "make room or choose another folder",
    error: type[UserError] = ConfigError,
) -> None:
    """Write a file in one go, its folder too if need be; killed at any moment, this leaves the old file or the new one.

    Args:
        path: of the file.
        content: text, bytes, or parts of the file in order, which are not copied.
        advice: how to fix it, the end of the one-line message.
        error: what is raised for a file that cannot be written.

    Raises:
        error: in one line that ends with `advice`, if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            parts = (
                [content.encode() if isinstance(content, str) else content]
                if isinstance(content, str | bytes)
                else content
            )
            file.writelines(parts)
    except OSError as fault:
        raise error(f"{printable(path)} cannot be written ({fault.strerror}); {advice}") from None


def open_to_append(path: Path) -> TextIO:
    """Open a regular UTF-8 file to append to, and make it if need be. OSError for a link, a FIFO or a device."""
    return open(_descriptor(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")


def open_lock(path: Path) -> int:
    """The descriptor of a lock file, made if need be. OSError for a link, a FIFO or a device."""
    return _descriptor(path, os.O_RDWR)


def _descriptor(path: Path, access: int) -> int:
    """Open a regular file to write to, or make it; without following a link, or waiting for the reader of a FIFO."""
    try:
        descriptor = os.open(path, access | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as fault:
        if fault.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR) or not os.path.lexists(path):
            raise
        words = f"it is {kind_of(path.lstat().st_mode)}, not a regular file"
        raise OSError(fault.errno, words, str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, not a regular file", str(path))
    return descriptor


class LineFile:
    """A file that grows by whole lines: a line for which there is no room leaves nothing of itself behind.

    Opening it raises OSError for a link, a FIFO or a device.
    """

    def __init__(self, path: Path):
        self._descriptor = _descriptor(path, os.O_RDWR | os.O_APPEND)

    def append(self, line: str) -> None:
        """Add a line, or raise OSError and leave the file as it was. A last line that was torn is ended first."""
        end = os.fstat(self._descriptor).st_size
        torn = end > 0 and os.pread(self._descriptor, 1, end - 1) != b"\n"
        rest = memoryview(b"\n" * torn + line.encode(errors="backslashreplace") + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, end)
            raise

    def cut(self, size: int) -> None:
        """Drop what is beyond the first `size` bytes, which needs no room; OSError if that fails."""
        os.ftruncate(self._descriptor, size)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Bring the lines to the disk, and close; once more does nothing."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # `append` has reported a disk that takes nothing
                os.fsync(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1  # its number may soon be another file's


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a rename in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def own_folder(folder: Path) -> None:
    """Make a folder inside one that may come from outside. OSError if a link or a file stands in its place."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    mode = folder.lstat().st_mode
    if not stat.S_ISDIR(mode):
        raise OSError(errno.ENOTDIR, f"it is {kind_of(mode)}, not a folder", str(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Who works in a folder
# ---------------------------------------------------------------------------------------------------------------------


class FolderLock:
    """Keeps other processes out of a folder until it is closed or its process ends, however it ends.

    `folder` is where it is; `find` notices that it was renamed. Raises ConfigError naming the process that holds it.
    """

    def __init__(self, folder: Path, flag: str = "--name"):
        self.folder, self._file, self._place = folder, -1, -1
        try:
            self._place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._file = open_lock(folder / ".lock")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._file, 32).decode(errors="replace")
            self.close()
            raise ConfigError(
                f"{folder} is in use by process {printable(owner)}; stop it or choose another {flag}"
            ) from None
        except BaseException:
            self.close()
            raise
        os.ftruncate(self._file, 0)
        os.write(self._file, str(os.getpid()).encode())

    @staticmethod
    def holder(folder: Path) -> str | None:
        """The process that holds `folder`, or None; nothing is written."""
        try:
            with open_regular(folder / ".lock") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return file.read(32).decode(errors="replace")
        except OSError:  # not there, or nothing that can be held
            pass
        return None

    def find(self) -> Path:
        """Where the folder is now, which becomes `folder`. UserError if its name is another's and Linux does not know its own."""
        held = os.fstat(self._place)
        if not _is_at(self.folder, held):
            with contextlib.suppress(OSError):
                moved = Path(os.readlink(f"/proc/self/fd/{self._place}"))
                if _is_at(moved, held):
                    self.folder = moved
                    return moved
            raise UserError(
                f"{self.folder} was renamed or deleted while the run worked in it, and cannot be found; nothing more was "
                "written; resume with --resume and its new name"
            )
        return self.folder

    def close(self) -> None:
        """Let others in."""
        for descriptor in (self._file, self._place):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._place = -1

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit, `os` may be gone before this is
        for descriptor in (self._file, self._place):
            if descriptor >= 0:
                close(descriptor)


def _is_at(path: Path, held: os.stat_result) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)
