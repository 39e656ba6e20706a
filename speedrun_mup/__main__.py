"""Where the process begins: `python -m speedrun_mup`, the script speedrun-mup, train.py."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys

from speedrun_mup.interrupts import TYPE_CHECKING, interrupt, leave

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, of which Ctrl-C is one line and exit code 130. argv: the words after the program's name."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # in the background of a shell it is ignored
        return _run(argv)
    signal.signal(signal.SIGINT, interrupt)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # the last thing but taking the interpreter down
    try:
        code = _run(argv)
    except KeyboardInterrupt:  # between two places that catch it
        leave(signal.SIGINT, None)
    signal.signal(signal.SIGINT, leave)  # the interpreter is taken down, and catches nothing any more
    return code


def _run(argv: Sequence[str] | None) -> int:
    from speedrun_mup.cli import main

    code = main(argv)
    trackers = sys.modules.get("speedrun_mup.training.trackers")  # not imported: there was no tracker
    groups = sys.modules.get("speedrun_mup.core.distributed")
    # A tracker that was given up is not asked to clean up: that may hang, or end in a traceback. Threads of a process
    # group may still be giving up tensors: one that does so while the interpreter is taken down aborts the process.
    if (trackers and trackers.Tracker.abandoned) or (groups and groups.has_left()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # full, closed, or None
                stream.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
