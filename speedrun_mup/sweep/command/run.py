"""One run of a command: started, kept from outliving its sweep, and what came of it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from speedrun_mup.files import printable, read_bytes
from speedrun_mup.sweep.any_sweep import AnyRun
from speedrun_mup.sweep.command import keeper
from speedrun_mup.sweep.command.files import read_logged
from speedrun_mup.sweep.command.formulas import Number
from speedrun_mup.sweep.command.metric import Curve, Metric, NoMetric
from speedrun_mup.sweep.command.template import Template, filled_text
from speedrun_mup.sweep.result import SCHEMA, Failure, RunResult
from speedrun_mup.training.tracking import clock
from speedrun_mup.transfer.axes import told_sizes

LOGS, OUTPUTS = "logs", "outputs"  # of a sweep's folder
GIVEN = ("seed", "out")  # placeholders that every command may have
FLOPS, PARAMS = "flops", "params"  # formulas that say what a run costs
MOST_SOURCE = 2**20  # bytes of a file that a command names, to be taken for code
COMMAND = "command"  # setting of an arm
_TRAILING = 300  # characters of a log's end that a message shows


@dataclass(frozen=True)
class Program:
    """What the commands of a sweep have in common.

    Args:
        metric: Where their loss is.
        formulas: Name of a placeholder -> number or formula; of the hyperparameter where its factor is 1. Also `params` and
            `flops`, if they are known.
        timeout: Seconds that a run may take, if there is a limit.
        initial_loss: A run that ends at or above it has diverged; None: the first loss that it printed.
        diverged_exits: Exit codes by which a command says that it diverged.
        shell: Whether a shell runs them.
        keep: Whether what they write to {out} stays.
        folder: Where they run, as an absolute path.
        files: Those of their own code that the commands name.
    """

    metric: Metric
    formulas: Mapping[str, str]
    timeout: float | None = None
    initial_loss: float | None = None
    diverged_exits: tuple[int, ...] = ()
    shell: bool = False
    keep: bool = False
    folder: str = "."
    files: tuple[str, ...] = ()

    def source(self) -> str:
        """A hash over the files of code that the commands name."""
        code = hashlib.sha256()
        for name in self.files:
            with contextlib.suppress(OSError):  # gone meanwhile, which makes another hash
                code.update(name.encode() + b"\0" + read_bytes(Path(self.folder) / name, MOST_SOURCE))
        return code.hexdigest()


@dataclass(frozen=True)
class Reading:
    """What was found of a run's losses. problem: why there are none."""

    loss: float = math.nan
    curve: Curve = field(default_factory=Curve)
    problem: str = ""


@dataclass(frozen=True)
class CommandRun(AnyRun):
    """One run of a command.

    Args:
        values: Of its placeholders, without {out}.
        unit: The hyperparameter where the factor is 1.
        cost: FLOPs, 0 where they are not known.
        tuned: The hyperparameter.
    """

    command: Template
    program: Program
    values: Mapping[str, Number]
    unit: float
    cost: float
    tuned: str

    def __str__(self) -> str:
        return (
            f"{self.arm} {told_sizes(self.sizes)} {self.tuned} {self.unit * 2.0**self.log2_factor:.4g} seed {self.seed}"
        )

    @functools.cached_property
    def id(self) -> str:
        """16 hex digits, the same wherever it runs: a hash of its arm, what is run, and which loss is read."""
        metric = self.program.metric
        what = [SCHEMA, COMMAND, self.arm, self.words("{out}"), metric.pattern]
        what += [] if metric.file is None else [metric.file]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    @functools.cached_property
    def flops(self) -> float:
        """What training it takes, as its formula says; 0 where there is none."""
        return self.cost

    def words(self, out: str) -> list[str]:
        """The program and its arguments. out: its folder."""
        return self.command.filled({**self.values, "out": out})

    @property
    def name(self) -> str:
        """For files: readable, and nobody else's."""
        at = [f"{key}{value}" for key, value in self.sizes.items()]
        told = "-".join([self.arm, *at, f"{self.tuned}{self.unit * 2.0**self.log2_factor:.4g}", f"seed{self.seed}"])
        return f"{re.sub(r'[^A-Za-z0-9._=+-]', '_', told)[:120]}-{self.id[:6]}"

    def run(self, scratch: Path) -> RunResult | Failure:
        """Run the command. Its output goes to a log of its own in the sweep's folder, which stays.

        Returns:
            A Failure for a command that fails, hangs, or prints no loss; one that diverges has a result.
        """
        began = time.perf_counter()
        out = (scratch.parent / OUTPUTS / self.name if self.program.keep else scratch / self.name).resolve()
        log = scratch.parent / LOGS / f"{self.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out, ignore_errors=True)  # of an attempt that was cut off
        out.mkdir(parents=True)
        source, since = self.program.source(), time.time()
        try:
            code = run_and_keep(self.words(str(out)), self.program.folder, log, self.program.timeout)
            took = time.perf_counter() - began
            if code is None:
                return Failure(
                    f"it did not end within {clock(self.program.timeout or 0)} (--timeout) and was killed{_end(log)}",
                    False,
                )
            return self._result(code, log, took, source, self._reading(out, log, since))
        finally:
            if not self.program.keep:
                shutil.rmtree(out, ignore_errors=True)

    def _reading(self, out: Path, log: Path, since: float) -> Reading:
        """Its losses, in its log or in a file that it wrote. since: when it began."""
        metric = self.program.metric
        try:
            if metric.file is None:
                return Reading(*metric.read(log))
            named = Path(self.program.folder, filled_text(metric.file, {**self.values, "out": out}, "--metric-file"))
            if metric.is_name:
                return Reading(*read_logged(named, metric.pattern, since))
            if not named.is_file():
                raise NoMetric(f"--metric-file {printable(named)} is not there")
            return Reading(*metric.read(named))
        except NoMetric as fault:
            return Reading(problem=str(fault))

    def _result(self, code: int, log: Path, took: float, source: str, found: Reading) -> RunResult | Failure:
        """What came of a command that ended."""
        loss, curve, problem = found.loss, found.curve, found.problem
        reason = self._divergence(code, loss, curve, problem)
        if code and not reason:
            return Failure(f"it ended with {_told_exit(code)}{_end(log)}", again=code >= 128)
        if problem and not reason:
            return Failure(f"{problem}{_end(log)}", again=False)
        return RunResult(
            id=self.id,
            arm=self.arm,
            sizes=dict(self.sizes),
            log2_factor=self.log2_factor,
            seed=self.seed,
            loss=loss if math.isfinite(loss) else math.nan,
            train_loss=math.nan,
            diverged=bool(reason),
            reason=reason,
            curve=curve.losses,
            seconds=took,
            train_s=took,
            flops=self.cost,
            corpus="",
            vocab_size=None,
            config={"iterations": len(curve.losses), "command": shlex.join(self.words("{out}"))},
            made_with={"source_sha256": source, "platform": platform.platform(), "host": platform.node()},
            unit=self.unit,
            steps=curve.steps,
        )

    def _divergence(self, code: int, loss: float, curve: Curve, problem: str) -> str:
        """Why the run has diverged; nothing if it has not."""
        if code in self.program.diverged_exits:
            return f"it ended with {_told_exit(code)}, which says so"
        if problem:
            return ""
        if not math.isfinite(loss):
            return f"its last loss is {loss}" + (f", then it ended with {_told_exit(code)}" if code else "")
        begin = self.program.initial_loss
        if begin is None:
            begin = next((value for value in curve.losses[:-1] if math.isfinite(value)), math.inf)
        return "" if code or loss < begin else f"ended at a loss of {loss:.4f}, began at {begin:.4f}"


def run_and_keep(words: list[str], folder: str, log: Path, timeout: float | None) -> int | None:
    """Run a command with its output in `log`; it ends when this process does.

    Returns:
        Its exit code, 128 + N after signal N; None if it took longer than `timeout` seconds, and was killed.
    """
    start = [sys.executable, "-I", "-S", keeper.__file__, *words]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # so that the log of a killed run has its last lines
    with open(log, "wb") as file:
        process = subprocess.Popen(
            start, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=environment
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.stdin:
                process.stdin.close()  # the keeper kills what is left
            process.wait()


def _told_exit(code: int) -> str:
    if code == 127:
        return "exit code 127: a program was not found"
    if code <= 128:
        return f"exit code {code}"
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return f"exit code {code}"
    return f"exit code {code} ({name}{', perhaps for lack of memory' if name == 'SIGKILL' else ''})"


def _end(log: Path) -> str:
    """The last line of a log and where it is, for the end of a message."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4 * _TRAILING))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    said = f"it last printed: {printable(lines[-1], _TRAILING)}" if lines else "it printed nothing"
    return f"; {said}; log: {printable(log)}"
