"""What a run leaves in its folder and what it shows: config.json, metrics.jsonl, log.txt, status.json; a progress bar.

metrics.jsonl is the source of truth. Trackers (TensorBoard, wandb, trackio) mirror it. Only rank 0 writes or shows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from tqdm import tqdm

import speedrun_mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import (
    LineFile,
    open_regular,
    printable,
    read_bytes,
    strict_json,
    without_escapes,
    write_whole,
)
from speedrun_mup.terminal import tell
from speedrun_mup.training.schedules import Schedule
from speedrun_mup.training.trackers import Tracker

LONG_RUN_S = 3600  # beyond this a run says how long it will take,
SLOW_STEP_S = 60  # after three steps or, if one takes this long, after one
PLAIN_EVERY_S = 5  # without a terminal, a line of progress this often
METRICS, LOG, CONFIG, PROVENANCE = "metrics.jsonl", "log.txt", "config.json", "provenance.json"
STATUS = "status.json"
LONGEST_LINE = 2**16  # bytes of a record of metrics.jsonl


def launch() -> str | None:
    """What distinguishes this torchrun, restarts included, from any other: its run id or, if it was given none, its process."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{platform.node()} {os.getppid()}" if run_id == "none" else run_id


@functools.cache
def source_sha256() -> str:
    """A hash over this package's source, taken once per process: call it early, before the files can change."""
    root = Path(speedrun_mup.__file__).parent
    sources = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sources.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return sources.hexdigest()


def provenance(command: list[str]) -> dict[str, str | None]:
    """The versions and the source revision behind a run: two runs are comparable only if these agree."""
    describe = ["git", "-C", str(Path(speedrun_mup.__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        revision = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        revision = ""
    return {
        "command": " ".join(command),
        "launch": launch(),
        "speedrun_mup": speedrun_mup.__version__,
        "revision": revision or "not known: no git, or not a git checkout",
        "source_sha256": source_sha256(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def attempts(folder: Path) -> list[dict[str, Any]]:
    """What each attempt of a run noted in provenance.json, the first one first; a line that is damaged is left out."""
    try:
        lines = read_bytes(folder / PROVENANCE).splitlines()
    except OSError:
        return []
    noted = []
    for line in lines:
        try:
            attempt = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(attempt, dict):
            noted.append(attempt)
    return noted


def read_status(folder: Path) -> dict[str, Any]:
    """What a run last wrote to status.json.

    Returns:
        status and why, "not known" if the file is not there or odd; missing_steps, the ranges that metrics.jsonl lacks.
    """
    try:
        told = json.loads(read_bytes(folder / STATUS))
        status, why = told["status"], told["why"]
        missing = [(int(first), int(last)) for first, last in told.get("missing_steps", ())]
        if not isinstance(status, str) or not isinstance(why, str | None):
            raise TypeError
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return {"status": "not known", "why": None, "missing_steps": []}
    return {"status": status, "why": why, "missing_steps": missing}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, in order. A torn last line, left by a kill, is dropped.

    Raises:
        ConfigError: in one line, for anything else that a run does not write.
    """
    return [record for _, record in _records(folder / METRICS)]


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every record of a metrics.jsonl, with the place where it ends."""
    try:
        with open_regular(path) as file:
            place = number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number, place = number + 1, place + len(line)
                fault, record = _parse(line)
                if not fault:
                    yield place, record
                    continue
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE)
                if file.read(1):
                    advice = "restore the file or start a new run"
                    raise ConfigError(f"{printable(path)}:{number} {fault}; {advice}")
    except OSError as fault:
        raise ConfigError(f"{printable(path)} cannot be read ({fault.strerror}); give the folder of a run") from None


_NUMBERS: dict[str, dict[str, Any]] = {  # that a record must have, by its kind; a loss that was not finite is null
    "train": {"tokens": int, "train_s": (int, float), "loss": (int, float, type(None))},
    "val": {"train_s": (int, float), "loss": (int, float, type(None))},
}


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    """What is wrong with a line of metrics.jsonl, or "", and the record in it."""
    if len(line) > LONGEST_LINE:
        return f"is longer than {LONGEST_LINE:,} bytes", {}
    try:
        record = json.loads(line.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return "is not JSON", {}
    if type(record) is not dict or type(record.get("kind")) is not str:
        return "is not a record", {}
    needed: dict[str, Any] = {"step": int} | _NUMBERS.get(record["kind"], {})
    for name, kind in needed.items():
        value = record.get(name, "")
        if isinstance(value, bool) or not isinstance(value, kind) or not (value is None or 0 <= abs(value) < 1e300):
            return f"has no right {name}", {}
    return ("has no right step", {}) if record["step"] < 0 else ("", record)


def _no_constant(text: str) -> None:
    raise ValueError(text)


def missing_steps(folder: Path, records: Sequence[Mapping[str, Any]], end: int = 0) -> list[tuple[int, int]]:
    """Steps (first, last) that metrics.jsonl lacks, because a disk was full; bad steps, which have a dump, are not missing.

    Args:
        folder: of the run.
        records: what `read_metrics` gave.
        end: steps that the run is known to have done.
    """
    there = {record["step"] for record in records if record["kind"] == "train"}
    dumps = (re.fullmatch(r"bad-step-(\d+)\.json", path.name) for path in folder.glob("bad-step-*.json"))
    there |= {int(dump[1]) for dump in dumps if dump}
    missing, before = [], -1
    for step in [*sorted(there), end] if end > max(there, default=-1) else sorted(there):
        if step > before + 1:
            missing.append((before + 1, step - 1))
        before = step
    return missing


def spans(steps: Sequence[tuple[int, int]], most: int = 3) -> str:
    """Ranges of steps, as text."""
    told = [str(first) if first == last else f"{first} to {last}" for first, last in steps[:most]]
    return ", ".join(told) + (f" and {len(steps) - most} more ranges" if len(steps) > most else "")


def clock(seconds: float) -> str:
    """Seconds as 4m05s, 3h20m or 2d04h."""
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes}m{int(seconds) % 60:02d}s"
    return (
        f"{minutes // 60}h{minutes % 60:02d}m" if minutes < 48 * 60 else f"{minutes // 1440}d{minutes // 60 % 24:02d}h"
    )


def _write_json(path: Path, content: dict[str, Any]) -> str:
    """Write a small file whole or not at all, as strict JSON that keeps "NaN" and "Infinity" apart. Why that failed, or ""."""
    try:
        text = json.dumps(json.loads(json.dumps(content), parse_constant=str), indent=1) + "\n"
        write_whole(path, text, advice="training continues")
    except ConfigError as fault:
        return str(fault)
    return ""


class RunLog:
    """Rank 0's record of a run; on other ranks every method does nothing.

    A disk that takes nothing costs one line, and every later record is tried again. `missing` are the ranges of steps that
    metrics.jsonl lacks because of that; status.json lists them, too.

    Args:
        folder: of the run.
        schedule: of the run, from which the time that is left is computed.
        start_step: of a resumed run; records of that step and later, left by a crashed attempt, are dropped.
        main: whether this is rank 0.
        progress: whether to show it.
        track: none, or a tracker that mirrors the metrics.
        config: the run's settings, for the tracker.
    """

    def __init__(
        self,
        folder: Path,
        schedule: Schedule,
        start_step: int,
        main: bool,
        progress: bool,
        track: str,
        config: dict[str, Any],
    ):
        self._main, self._folder, self._tracker = main, folder, None
        if not main:
            return
        self._metrics, self._log = _line_file(folder / METRICS), _line_file(folder / LOG)
        self._live = progress and bool(sys.stderr) and sys.stderr.isatty()
        self._plain = progress and not self._live
        self._schedule, self._steps, self._last_plain = schedule, schedule.iterations, -math.inf
        self._warned_long = False
        self._warned_disk = False
        self._lost: list[int] = []  # steps whose records found no room, until there is room again
        self._status: dict[str, Any] = {}
        self._bar = tqdm(total=self._steps, unit="step", disable=not self._live, dynamic_ncols=True)
        self.rewind(start_step)
        if track != "none":
            self._tracker = Tracker(track, folder, config, start_step, self._warn)
        if self.missing:
            self._warn(f"warning: {METRICS} lacks steps {spans(self.missing)}: there was no room for them")

    def rewind(self, step: int, train_s: float | None = None) -> None:
        """Drop the records of `step` and later: they will come again, from `train_s` on (default: that of what is kept)."""
        if not self._main:
            return
        end, kept = 0, []
        for place, record in _records(self._folder / METRICS):
            if record["step"] >= step:
                break  # a run writes its records in order, so those after it are of that step and later, too
            end = place
            kept.append(record)
        try:
            self._metrics.cut(end)
        except OSError as fault:
            self._warn_of(METRICS, fault)
        self._lost, self.missing = [], missing_steps(self._folder, kept, step)
        last = max((record["train_s"] for record in kept), default=0.0)
        self._steps_seen, self._resumed_train_s = 0, last if train_s is None else train_s
        self._bar.n = step
        self._bar.refresh()
        if self._tracker:
            self._tracker.rewind(step)

    def move(self, folder: Path) -> None:
        """Continue in `folder`, which is the same one under a new name."""
        self._folder = folder

    def write_status(self, status: str, why: str | None = None) -> None:
        """Write status.json, because torchrun hides the exit codes of its ranks. status: running, finished, stopped, failed."""
        if self._main:
            self._status = {"status": status, "why": why, "pid": os.getpid()}
            self._update_status()

    def _update_status(self) -> None:
        missing = self.missing + ([(min(self._lost), max(self._lost))] if self._lost else [])
        told = {**self._status, "time": time.time(), **({"missing_steps": missing} if missing else {})}
        fault = _write_json(self._folder / STATUS, told)
        if fault:
            self._warn_of_disk(fault)

    def dump(self, name: str, content: dict[str, Any]) -> None:
        """Write a small JSON file into the run's folder."""
        fault = _write_json(self._folder / name, content) if self._main else ""
        if fault:
            self._warn_of_disk(fault)

    def say(self, text: str) -> None:
        """Show a line and keep it in log.txt."""
        if self._main:
            self._bar.clear()
            tell(text)
            self._write_log(text)

    def train(self, record: Mapping[str, Any]) -> None:
        """One optimizer step: kind, step, loss, tokens and train_s, both since the start. Early on, warns of a long run."""
        if not self._main:
            return
        done, tokens_per_s = record["step"] + 1, self._pace(record)
        eta = (self._schedule.tokens - record["tokens"]) / tokens_per_s
        self._keep({**record, "tokens_per_s": tokens_per_s})
        self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {tokens_per_s:,.0f} tok/s")
        self._bar.update()
        if self._plain and (record["train_s"] - self._last_plain >= PLAIN_EVERY_S or done == self._steps):
            self._last_plain = record["train_s"]
            rate = f"{tokens_per_s:,.0f} tokens/s"
            tell(f"step {done}/{self._steps}  loss {record['loss']:.4f}  {rate}  {clock(eta)} left")
        slow = self._schedule.at(record["step"]).tokens / tokens_per_s > SLOW_STEP_S
        if eta > LONG_RUN_S and not self._warned_long and (self._steps_seen == 3 or slow):
            self._warned_long = True
            self.say(f"estimated time: {clock(eta)} (from the first steps)")

    def _pace(self, record: Mapping[str, Any]) -> float:
        """Tokens per second, averaged since the last (re)start but for its first step, which warms up."""
        self._steps_seen += 1
        if self._steps_seen == 1:
            self._first = record["tokens"], record["train_s"]
            tokens, seconds = self._schedule.at(record["step"]).tokens, record["train_s"] - self._resumed_train_s
        else:
            tokens, seconds = record["tokens"] - self._first[0], record["train_s"] - self._first[1]
        return float(tokens / max(seconds, 1e-9))

    def val(self, record: Mapping[str, Any]) -> None:
        """One validation: kind, step, loss, train_s and, where it is known, bits_per_byte."""
        if self._main:
            self._keep(record)
            bits = record.get("bits_per_byte")
            per_byte = "" if bits is None else f" ({bits:.3f} bits per byte)"
            self.say(
                f"step {record['step']}/{self._steps}  val_loss {record['loss']:.4f}{per_byte}  "
                f"train time {clock(record['train_s'])}"
            )

    def _keep(self, record: Mapping[str, Any]) -> None:
        try:
            self._metrics.append(strict_json(record))
        except OSError as fault:
            self._lost.append(record["step"])
            self._warn_of(METRICS, fault)
        else:
            if self._lost:
                self._tell_of_gap()
        if self._tracker:
            self._tracker.log(record)

    def _tell_of_gap(self) -> None:
        """There is room again: say in log.txt and status.json which steps metrics.jsonl lacks, and warn again next time."""
        gap = (min(self._lost), max(self._lost))
        self._lost.clear()
        self._warned_disk = False
        self.missing.append(gap)
        self._warn(f"warning: {METRICS} can be written again; it lacks steps {spans([gap])}")
        if self._status:
            self._update_status()

    def _write_log(self, text: str) -> None:
        try:
            self._log.append(without_escapes(text))
        except OSError as fault:
            self._warn_of(LOG, fault)

    def _warn(self, text: str) -> None:
        tell(text, error=True)
        self._write_log(text)

    def _warn_of(self, name: str, fault: OSError) -> None:
        advice = "training continues; make room, or see who may write there"
        self._warn_of_disk(f"{printable(self._folder / name)} cannot be written ({fault.strerror}); {advice}")

    def _warn_of_disk(self, text: str) -> None:
        if not self._warned_disk:
            self._warned_disk = True
            self._warn(f"warning: {text}")

    def close(self) -> None:
        """Close files, bar and tracker."""
        if self._main:
            self._bar.close()
            if self._tracker:
                self._tracker.close()
            if self._lost:
                self._warn(f"warning: {METRICS} lacks steps {min(self._lost)} to {max(self._lost)}")
            self._metrics.close()
            self._log.close()


def _line_file(path: Path) -> LineFile:
    try:
        return LineFile(path)
    except OSError as fault:
        advice = "remove it, or choose another folder with --out"
        raise ConfigError(f"{printable(path)} cannot be written ({fault.strerror}); {advice}") from None
