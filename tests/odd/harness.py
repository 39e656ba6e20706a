"""Run one command in a forked child that has imported everything, and judge how it ended.

A child costs milliseconds, so hundreds of inputs can be tried. What is judged is what a user sees: a traceback, an error
of more than one line, an exit code that nobody documented, a hang, or an exit code 0 for an input that has no right answer.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

CODES = {0, 1, 2, 3, 4, 5, 6, 75, 130, 141}  # docs/reliability.md; 1 is also a verdict that is no PASS
SECONDS = 90  # more than any command needs for these inputs, on a busy machine
MEMORY = 3 * 2**30  # bytes that a child may add to what it was born with

# What a child shall not have to import.
HEAVY = (
    "training.run",
    "sweep",
    "plan",
    "transfer",
    "report",
    "coord_check",
    "bench",
    "doctor",
    "data.tokenize_text",
    "explain",
    "data.fineweb",
)


@dataclass(frozen=True)
class Outcome:
    """How a child ended. code: None if it was stopped for taking too long."""

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def said(self) -> str:
        """Everything that was printed."""
        return self.out + self.err


Judge = Callable[[Outcome], str]  # what is wrong, "" for nothing


@dataclass(frozen=True)
class Case:
    """One odd input.

    kind: a row of the table. name: what is odd. words: of the command line. prepare: makes files in the child's
    own folder, which is its working folder. judge: beyond what must hold for all.
    """

    kind: str
    name: str
    words: Sequence[str]
    prepare: Callable[[Path], object] = lambda folder: None
    judge: Judge = lambda outcome: ""
    env: Mapping[str, str | None] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}: speedrun-mup {' '.join(self.words)[:200]}"


def refused(outcome: Outcome) -> str:
    """The input has no right answer, so the exit code must say so."""
    return "silent: exit code 0 for an input without a right answer" if outcome.code == 0 else ""


def fault_in(outcome: Outcome) -> str:
    """What no outcome may show, whatever the input."""
    if outcome.code is None:
        return f"hang: not done after {SECONDS} s"
    if "Traceback (most recent call last)" in outcome.said:
        return "traceback"
    if outcome.code not in CODES:
        return f"exit code {outcome.code}"
    if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", outcome.said):
        return "control characters reached the terminal"
    errors = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    if outcome.code in (2, 3, 4) and len(errors) != 1:
        return f"{len(errors)} lines of error for exit code {outcome.code}"
    return ""


def attempt(case: Case, folder: Path) -> tuple[Outcome, str]:
    """Run the case in `folder`, which is made; its outcome and what is wrong with it, "" for nothing."""
    folder.mkdir(parents=True)
    out, err = folder.with_suffix(".out"), folder.with_suffix(".err")
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _live(case, folder, out, err)
    code = _wait(pid)
    texts = (path.read_bytes().decode(errors="replace") if path.exists() else "" for path in (out, err))
    outcome = Outcome(code, *texts, time.perf_counter() - began)
    return outcome, fault_in(outcome) or case.judge(outcome)


def _wait(pid: int) -> int | None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _live(case: Case, folder: Path, out: Path, err: Path) -> None:
    """The child: never returns."""
    code = 99
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in (1, out), (2, err):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        for key, value in case.env.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
        warnings.simplefilter("default")
        torch.set_num_threads(1)
        case.prepare(folder)
        from speedrun_mup.cli import main

        code = main(list(case.words))
        sys.stdout.flush()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
