"""Forked lives, tapped file-system calls, and ranks that are threads.

Torch is imported before the fork, so a life takes milliseconds. A kill does not lose what the kernel holds in memory:
tapped calls of fsync are seen but not carried out, and what survives a power cut is judged by the order of the calls.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import torch

from speedrun_mup.core.utils import World

CALLS = ("mkdir", "open", "write", "fsync", "close", "rename", "replace", "unlink", "rmdir")
REAL = {name: getattr(os, name) for name in CALLS} | {"fsync": lambda descriptor: None}

T = TypeVar("T")
Tap = Callable[[str, tuple[Any, ...]], None]  # (name, arguments) of a call of os that is about to happen


def repeats(short: int) -> int:
    """How often a test injects its fault: `short`, unless benchmarks/reliability.py asks for more."""
    return int(os.environ.get("RELIABILITY_COUNT", short))


def dice(seed: int) -> random.Random:
    """What a test draws its faults from; benchmarks/reliability.py may ask for others."""
    return random.Random(f"{seed} {os.environ.get('RELIABILITY_SEED', 0)}")


@contextmanager
def tapped(tap: Tap) -> Iterator[None]:
    """Let `tap` see every mutating call of os first. It may raise instead, or kill the process."""

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not (name == "open" and args[1] & os.O_ACCMODE == os.O_RDONLY and os.path.isfile(args[0])):
                tap(name, args)
            return REAL[name](*args, **kwargs)

        return call

    with mock.patch.multiple(os, **{name: wrap(name) for name in CALLS}):
        yield


def path_of(name: str, args: tuple[Any, ...]) -> str:
    """The path that a tapped call works on, also if it was given a descriptor."""
    return os.readlink(f"/proc/self/fd/{args[0]}") if name in ("write", "fsync", "close") else str(args[0])


def count_calls(work: Callable[[], object]) -> list[str]:
    """The names of the calls that `work` makes, in order."""
    names: list[str] = []
    with tapped(lambda name, _: names.append(name)):
        work()
    return names


def die_at(index: int, written: float) -> Tap:
    """A tap that kills the process before call `index`; if it is a write, after that fraction of it is written."""
    counter = iter(range(1_000_000))

    def tap(name: str, args: tuple[Any, ...]) -> None:
        if next(counter) == index:
            if name == "write":
                REAL["write"](args[0], bytes(args[1])[: int(written * len(args[1]))])
            os.kill(os.getpid(), signal.SIGKILL)

    return tap


def fail_at(index: int, code: int) -> Tap:
    """A tap that raises OSError `code` at call `index`, once; a write is half done by then."""
    counter = iter(range(1_000_000))

    def tap(name: str, args: tuple[Any, ...]) -> None:
        if next(counter) == index:
            if name == "write":
                REAL["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
            raise OSError(code, os.strerror(code))

    return tap


def fork(work: Callable[[], object]) -> int:
    """Start `work` in a child process that ends when it returns, or after five minutes; its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork beside threads
        pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(300)
        torch.set_num_threads(1)  # torch rebuilds its pool after a fork; two threads that come first race for it
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def fork_together(works: Sequence[Callable[[], object]]) -> list[int]:
    """Start each of `works` in a child process, none before all are there; their process ids.

    The thread that answers the first rank at a store takes a lock of the C library to look up its address. A rank that was
    forked meanwhile would find that lock taken for ever.
    """
    gate, opening = os.pipe()

    def live(work: Callable[[], object]) -> None:
        os.close(opening)
        os.read(gate, 1)  # returns when nobody holds the other end any more
        os.close(gate)
        work()

    pids = [fork(partial(live, work)) for work in works]
    os.close(gate)
    os.close(opening)
    return pids


def wait(pid: int) -> int:
    """The exit code of a child; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Meeting:
    """Where threads that play ranks exchange values."""

    def __init__(self, size: int):
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank that is a thread of this process."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather_objects(self, value: Any) -> list[Any]:
        return self.meeting.gather(self.rank, value)


def on_ranks(size: int, work: Callable[[World], T]) -> list[T | Exception]:
    """What `work` returns or raises on each of `size` ranks."""
    meeting = Meeting(size)

    def run(rank: int) -> T | Exception:
        try:
            return work(ThreadWorld(rank, size, meeting=meeting))
        except Exception as fault:
            return fault

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
