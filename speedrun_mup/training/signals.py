"""Signals that ask work to stop: what a run collects and a sweep is interrupted by, under one way of installing handlers."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from speedrun_mup.core.utils import PARENT_DIED
from speedrun_mup.interrupts import after_imports

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def handled(numbers: tuple[int, ...], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Have `handler` called for these signals, and put the handlers back that were there before.

    Outside the main thread Python allows no handlers: nothing changes.
    """
    previous = {}
    try:
        for number in numbers:
            previous[number] = signal.signal(number, handler)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 raise KeyboardInterrupt with their name."""

    def interrupt(number: int, frame: Any) -> None:
        def stop() -> None:
            raise KeyboardInterrupt(signal.Signals(number).name)

        after_imports(stop, frame)

    with handled(STOPPING, interrupt):
        yield


class StoppedEarly(BaseException):
    """A signal that came while nothing was there to save; no Exception, because compilers take those for their own."""


class StopSignals(list[str]):
    """Names of the signals that asked a run to stop. They wait only where something is to be saved."""

    something_to_save = False


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Collect SIGINT, SIGTERM and SIGUSR1 in a list instead of dying of them; the third ends the process at once.

    While there is nothing to save, the first raises StoppedEarly too: compiling can take minutes. The end of torchrun is in
    the list as well, unless something else came before; it counts once, however often it arrives. Outside the main thread
    the list stays empty.
    """
    received = StopSignals()

    def stop_early() -> None:
        if not received.something_to_save:
            raise StoppedEarly(received[0])  # code that drops this, as a finalizer does, stops after the step

    def on_signal(number: int, frame: Any) -> None:
        name = "the end of torchrun or SIGUSR2" if number == PARENT_DIED else signal.Signals(number).name
        if number == PARENT_DIED and received:
            return
        received.append(name)
        if len(received) == 1:  # a second would interrupt what the first has begun
            after_imports(stop_early, frame)
        if len(received) == 2 and received.something_to_save:
            print(f"{received[-1]}: still saving; once more to quit without saving", file=sys.stderr)
        if len(received) >= 3:
            os._exit(128 + number)

    with handled((*STOPPING, PARENT_DIED), on_signal):
        yield received
