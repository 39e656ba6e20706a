"""What a command prints: without control characters of anybody's, in any encoding, and never the end of a run.

with guarded(keep_going=True) as terminal:
    ...
terminal.lost  # whether something that was printed did not arrive
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from speedrun_mup.core.errors import in_a_line
from speedrun_mup.files import without_escapes


class GuardedStream(io.TextIOBase):
    """A text stream around another one: writing to it makes escape sequences visible and raises nothing.

    The first write that fails switches it off, with one line on `other`. keep_going: without it, a reader that has
    gone (BrokenPipeError) ends the command.
    """

    def __init__(self, stream: TextIO, name: str, keep_going: bool, other: Any = None):
        self._stream, self._name, self.keep_going, self.other = stream, name, keep_going, other
        self.failure: BaseException | None = None

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    def isatty(self) -> bool:
        """Whether a person is looking."""
        return self.failure is None and not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        """The descriptor below."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Always: what fails is dropped."""
        return True

    def write(self, text: str) -> int:
        """Write, or drop if it cannot be written."""
        if self.failure is None:
            visible = without_escapes(text)
            try:
                try:
                    self._stream.write(visible)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding or "ascii"
                    self._stream.write(visible.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as fault:
                self._fail(fault)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what cannot be written."""
        if self.failure is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as fault:
                self._fail(fault)

    def _fail(self, fault: OSError | ValueError) -> None:
        self.failure = fault
        with contextlib.suppress(OSError, ValueError):  # what waits in the buffer goes nowhere, without a second fault
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if isinstance(fault, BrokenPipeError) and not self.keep_going:
            raise fault
        if self.other is not None:
            print(
                f"warning: {self._name} cannot be written ({in_a_line(fault)}); not written from here on",
                file=self.other,
            )


def tell(text: str, error: bool = False) -> None:
    """Print a line, to stderr if it is an error, however the streams were set up: raises nothing, shows no escape sequence."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # full, gone, closed, or None
        stream = sys.stderr if error else sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        line = without_escapes(text).encode(encoding, "backslashreplace").decode(encoding)
        stream.write(line + "\n")
        stream.flush()


class Terminal:
    """The guarded stdout and stderr of this process."""

    def __init__(self, out: GuardedStream | None, err: GuardedStream | None):
        self.out, self.err = out, err

    @property
    def lost(self) -> bool:
        """Whether something that was written to stdout did not arrive."""
        return self.out is None or self.out.failure is not None


@contextlib.contextmanager
def guarded(keep_going: bool) -> Iterator[Terminal]:
    """Guard sys.stdout and sys.stderr for a block. Descriptors 0 to 2 that were closed are opened on the null device.

    Without that, the next file that is opened would get the number 1, and everything that is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    before = sys.stdout, sys.stderr
    err = GuardedStream(sys.stderr, "stderr", True) if sys.stderr else None
    out = GuardedStream(sys.stdout, "stdout", keep_going, err) if sys.stdout else None
    streams: Any = out, err or open(os.devnull, "w")  # print(file=None) would go to stdout
    sys.stdout, sys.stderr = streams
    try:
        yield Terminal(out, err)
    finally:
        for stream in (out, err):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
