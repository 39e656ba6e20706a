"""What a run leaves in its folder and what it shows: config.json, metrics.jsonl, log.txt, status.json; a progress bar.

metrics.jsonl is the source of truth. Trackers (TensorBoard, wandb, trackio) mirror it. Only rank 0 writes or shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy
import torch
from tqdm import tqdm

import speedrun_mup
from speedrun_mup.core.errors import ConfigError

LONG_RUN_S = 3600  # beyond this a run says how long it will take,
SLOW_STEP_S = 60  # after three steps or, if one takes this long, after one
PLAIN_EVERY_S = 5  # without a terminal, a line of progress this often
METRICS, LOG, CONFIG, PROVENANCE = "metrics.jsonl", "log.txt", "config.json", "provenance.json"
STATUS = "status.json"


def launch() -> str | None:
    """What tells this torchrun, restarts included, from any other: its run id or, if it was given none, its process."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{platform.node()} {os.getppid()}" if run_id == "none" else run_id


def provenance(command: list[str]) -> dict[str, str | None]:
    """The versions and the source revision behind a run: two runs are comparable only if these agree."""
    root = Path(speedrun_mup.__file__).parent
    sources = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sources.update(str(path.relative_to(root)).encode() + path.read_bytes())
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        revision = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        revision = ""
    return {
        "command": " ".join(command),
        "launch": launch(),
        "speedrun_mup": speedrun_mup.__version__,
        "revision": revision or "not known: no git, or not a git checkout",
        "source_sha256": sources.hexdigest(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def read_status(folder: Path) -> dict[str, Any]:
    """What a run said of itself last, in status.json: status, why, pid, time. "not known" if the file is not there or odd."""
    try:
        told = json.loads((folder / STATUS).read_bytes())
        return {"status": told["status"], "why": told["why"]}
    except (OSError, ValueError, TypeError, KeyError):
        return {"status": "not known", "why": None}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, in order. A torn last line, left by a kill, is dropped."""
    records = []
    try:
        lines = (folder / METRICS).read_text().splitlines()
    except OSError as fault:
        raise ConfigError(f"{folder / METRICS} cannot be read ({fault.strerror}); give the folder of a run") from None
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ConfigError(
                    f"{folder / METRICS}:{number} is not JSON; restore the file or start a new run"
                ) from None
    return records


def clock(seconds: float) -> str:
    """Seconds as 4m05s, 3h20m or 2d04h."""
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes}m{int(seconds) % 60:02d}s"
    return (
        f"{minutes // 60}h{minutes % 60:02d}m" if minutes < 48 * 60 else f"{minutes // 1440}d{minutes // 60 % 24:02d}h"
    )


def _strict(record: Mapping[str, Any]) -> str:
    """One line of strict JSON; a number that is not finite becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file whole or not at all, as strict JSON, with "NaN" and "Infinity". A full disk costs a warning."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(json.loads(json.dumps(content), parse_constant=str), indent=1) + "\n")
        os.replace(part, path)
    except OSError as fault:
        print(f"warning: {path} cannot be written ({fault.strerror}); training goes on", file=sys.stderr)


class Tracker:
    """A mirror of the metrics in somebody's tracker. kind: tensorboard, wandb or trackio."""

    def __init__(self, kind: str, folder: Path, config: dict[str, Any]):
        self.kind = kind
        try:
            if kind == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
            else:
                module = __import__(kind)
                self._writer = module.init(project="speedrun-mup", name=folder.name, config=config)
        except ImportError:
            raise ConfigError(f"track={kind} needs a package: pip install 'speedrun-mup[{kind}]'") from None

    def log(self, record: Mapping[str, Any]) -> None:
        """Mirror one record; its numbers are named kind/name."""
        step = record["step"]
        values = {f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        if self.kind == "tensorboard":
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        else:
            self._writer.log(values, step=step)

    def close(self) -> None:
        """Flush and end."""
        self._writer.close() if self.kind == "tensorboard" else self._writer.finish()


class RunLog:
    """Rank 0's record of a run; on other ranks every method does nothing.

    start_step: of a resumed run; records of that step and later, left by a life that died, are dropped.
    """

    def __init__(
        self, folder: Path, steps: int, start_step: int, main: bool, progress: bool, track: str, config: dict[str, Any]
    ):
        self._main = main
        if not main:
            return
        self._tracker = None if track == "none" else Tracker(track, folder, config)
        self._metrics_path = folder / METRICS
        self._metrics: TextIO = open(self._metrics_path, "a")
        self._log: TextIO = open(folder / LOG, "a")
        self._live = progress and sys.stderr.isatty()
        self._plain = progress and not self._live
        self._steps, self._last_plain = steps, -math.inf
        self._warned_long = self._warned_disk = False
        self._bar = tqdm(total=steps, unit="step", disable=not self._live, dynamic_ncols=True)
        self.rewind(start_step)

    def rewind(self, step: int, train_s: float | None = None) -> None:
        """Drop the records of `step` and later: they will come again, from `train_s` on (default: that of what is kept)."""
        if not self._main:
            return
        kept = [record for record in read_metrics(self._metrics_path.parent) if record["step"] < step]
        part = self._metrics_path.with_name(f".{METRICS}.part")
        try:
            part.write_text("".join(_strict(record) + "\n" for record in kept))
            os.replace(part, self._metrics_path)
            self._metrics.close()
            self._metrics = open(self._metrics_path, "a")
        except OSError as fault:
            self._warn_once(METRICS, fault)
        last = max((record["train_s"] for record in kept), default=0.0)
        self._steps_seen, self._resumed_train_s = 0, last if train_s is None else train_s
        self._bar.n = step
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Show a line and keep it in log.txt."""
        if self._main:
            self._bar.clear()
            print(text, flush=True)
            self._write(self._log, text)

    def train(self, record: Mapping[str, Any]) -> None:
        """One optimizer step: kind, step, loss, tokens and train_s, both since the start. Early on, warns of a long run."""
        if not self._main:
            return
        done, (tokens, seconds) = record["step"] + 1, self._pace(record)
        eta = seconds * (self._steps - done)
        self._keep({**record, "tokens_per_s": tokens / seconds})
        self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {tokens / seconds:,.0f} tok/s")
        self._bar.update()
        if self._plain and (record["train_s"] - self._last_plain >= PLAIN_EVERY_S or done == self._steps):
            self._last_plain = record["train_s"]
            rate = f"{tokens / seconds:,.0f} tokens/s"
            print(f"step {done}/{self._steps}  loss {record['loss']:.4f}  {rate}  {clock(eta)} left", flush=True)
        if eta > LONG_RUN_S and not self._warned_long and (self._steps_seen == 3 or seconds > SLOW_STEP_S):
            self._warned_long = True
            self.say(f"this run will take about {clock(eta)} here, by its first steps; going on")

    def _pace(self, record: Mapping[str, Any]) -> tuple[float, float]:
        """Tokens and seconds of a step, averaged over this life but for its first step, which warms up."""
        now = (record["step"] + 1, record["tokens"], record["train_s"])
        self._steps_seen += 1
        if self._steps_seen == 1:
            self._first = now
            return record["tokens"] / now[0], max(record["train_s"] - self._resumed_train_s, 1e-9)
        steps, tokens, seconds = (a - b for a, b in zip(now, self._first))
        return tokens / steps, max(seconds, 1e-9) / steps

    def val(self, record: Mapping[str, Any]) -> None:
        """One validation: kind, step, loss, train_s."""
        if self._main:
            self._keep(record)
            self.say(
                f"step {record['step']}/{self._steps}  val_loss {record['loss']:.4f}  train time {clock(record['train_s'])}"
            )

    def _keep(self, record: Mapping[str, Any]) -> None:
        self._write(self._metrics, _strict(record))
        if self._tracker:
            self._tracker.log(record)

    def _write(self, file: TextIO, line: str) -> None:
        """Append a line. A full disk costs the line and one warning, not the run."""
        try:
            file.write(line + "\n")
            file.flush()
        except OSError as fault:
            self._warn_once(file.name, fault)

    def _warn_once(self, name: str, fault: OSError) -> None:
        if not self._warned_disk:
            self._warned_disk = True
            print(f"warning: {name} cannot be written ({fault.strerror}); training goes on", file=sys.stderr)

    def close(self) -> None:
        """Close files, bar and tracker."""
        if self._main:
            self._bar.close()
            for file in (self._metrics, self._log):
                with contextlib.suppress(OSError):  # of lines that found no room, and were warned of
                    file.close()
            if self._tracker:
                self._tracker.close()
