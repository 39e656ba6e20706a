"""Where the process begins: `python -m speedrun_mup`, the script speedrun-mup, train.py.

Ctrl-C is one line and exit code 130 from here on. While modules are being imported it may not be an exception: libraries catch
it, or pass it on as another one, and C++ ends the process for it. There is nothing to save then, so the process ends.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; `argv` are the words after the program's name."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # in the background of a shell it is ignored
        return _run(argv)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        code = _run(argv)
    except KeyboardInterrupt:  # between two places that catch it
        _leave(signal.SIGINT, None)
    signal.signal(signal.SIGINT, _leave)  # the interpreter is taken down, and catches nothing any more
    return code


def _run(argv: Sequence[str] | None) -> int:
    from speedrun_mup.cli import main

    return main(argv)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A KeyboardInterrupt, unless something is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave(number, frame)
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: it was just being written
        sys.stdout.flush()
    os.write(2, b"error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
