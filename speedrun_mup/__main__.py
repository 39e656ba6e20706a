"""Where the process begins: `python -m speedrun_mup`, the script speedrun-mup, train.py."""

import signal
import sys
from collections.abc import Sequence

from speedrun_mup.interrupts import interrupt, leave


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, of which Ctrl-C is one line and exit code 130. argv: the words after the program's name."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # in the background of a shell it is ignored
        return _run(argv)
    signal.signal(signal.SIGINT, interrupt)
    try:
        code = _run(argv)
    except KeyboardInterrupt:  # between two places that catch it
        leave(signal.SIGINT, None)
    signal.signal(signal.SIGINT, leave)  # the interpreter is taken down, and catches nothing any more
    return code


def _run(argv: Sequence[str] | None) -> int:
    from speedrun_mup.cli import main

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
