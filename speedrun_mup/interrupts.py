"""Signals while modules are being imported, where an exception is caught by libraries, passed on as another one, or fatal."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # importing typing would take longer than everything else here, before Ctrl-C has its handler
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

AGAIN_S = 0.05  # between two looks whether modules are still being imported


def importing(frame: FrameType | None) -> bool:
    """Whether the code at `frame` runs because a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def after_imports(act: Callable[[], None], frame: FrameType | None) -> None:
    """Call `act`, which may raise, in a signal handler: now, or as soon as no module is being imported."""
    if importing(frame):
        signal.signal(signal.SIGALRM, lambda _, later: after_imports(act, later))
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
    else:
        act()


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of Ctrl-C where there is nothing to save: a KeyboardInterrupt, but the end while modules are imported."""
    if importing(frame):
        leave(number, frame)
    raise KeyboardInterrupt


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """End the process at once, in one line."""
    try:  # noqa: SIM105 (contextlib may not be imported yet)
        sys.stdout.flush()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: it was just being written
        pass
    os.write(2, b"error: interrupted\n")
    os._exit(130)
