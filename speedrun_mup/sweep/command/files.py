"""The loss of a run in a file that its command wrote: CSV, JSONL, TensorBoard, trainer_state.json, or a folder of these."""

from __future__ import annotations

import math
from pathlib import Path

from speedrun_mup.files import printable
from speedrun_mup.sweep.command.metric import Curve, NoMetric
from speedrun_mup.transfer import TransferError
from speedrun_mup.transfer.sources import FORMATS, logs_in
from speedrun_mup.transfer.sources.logs import LoggedRun

_SLACK = 2.0  # seconds by which the clock of a file system may be behind


def read_logged(path: Path, name: str, since: float) -> tuple[float, Curve]:
    """The last value of the curve `name`, and its first and last.

    Args:
        path: A file, or a folder with the files of one run.
        name: Of a column, a key or a tag; nested ones with "/" between.
        since: When the run began, in seconds since the epoch: an older file is of another run.

    Raises:
        NoMetric: There is no such file or no such curve.
    """
    runs = _runs(path, since)
    found = [run.curves[name] for run in runs if name in run.curves]
    if len(found) != 1:
        have = ", ".join(printable(other, 40) for other in sorted({other for run in runs for other in run.curves})[:12])
        told = f"{len(found)} files below have it; name one" if found else f"there is {have or 'nothing'}"
        raise NoMetric(f"--metric {printable(name, 60)} in {printable(path)}: {told}")
    (curve,) = found
    points = {0: curve.first} if curve.start < curve.step and math.isfinite(curve.start) else {}
    step = int(curve.step) if math.isfinite(curve.step) else 1
    return curve.last, Curve.of([*points.items(), (max(step, 1), curve.last)])


def _runs(path: Path, since: float) -> list[LoggedRun]:
    """What was logged there. Raises NoMetric."""
    try:
        logs = logs_in(path) if path.exists() and path.suffix not in (".csv", ".jsonl") else {}
        name = next(iter(logs), "curves")
        files = logs.get(name, [path] if path.suffix in (".csv", ".jsonl") else [])
        fresh = [file for file in files if file.is_file() and file.stat().st_mtime >= since - _SLACK]
        if not fresh:
            what = "was not written by this run" if files and files[0].is_file() else "is no log that can be read"
            raise NoMetric(f"--metric-file {printable(path)} {what if path.exists() else 'is not there'}")
        return list(FORMATS[name].read(fresh, path if path.is_dir() else path.parent))
    except (TransferError, OSError) as fault:
        raise NoMetric(f"--metric-file: {fault}") from None
