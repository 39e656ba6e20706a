"""Mirrors of a run's metrics in TensorBoard, wandb or trackio, each in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from speedrun_mup.core.errors import ConfigError, in_a_line
from speedrun_mup.files import own_folder, printable
from speedrun_mup.packages import import_package

TRACKER_WAIT_S = 60.0  # for a tracker to take what is left, at the end
TRACKER_BACKLOG = 100_000  # records that a tracker may be behind
TRACKER_FIXES = {  # what to do about a tracker that fails
    "tensorboard": "make room where the run's folder is",
    "wandb": "run `wandb login`, or set WANDB_MODE=offline",
    "trackio": "see that trackio works here",
}


class Tracker:
    """A mirror of the metrics in a tracker, which works in a thread of its own: no fault of it reaches the run.

    The first fault of any kind switches it off, with one line.

    Args:
        kind: tensorboard, wandb or trackio.
        folder: of the run.
        config: the run's settings.
        start_step: of a resumed run; TensorBoard hides what a crashed attempt mirrored of that step and later.
        warn: is called with the line, in the tracker's thread.

    Raises:
        ConfigError: if the package is not installed.
    """

    abandoned = False  # whether any tracker of this process failed, so that it may not end by itself

    def __init__(
        self, kind: str, folder: Path, config: dict[str, Any], start_step: int = 0, warn: Callable[[str], None] = print
    ):
        self.kind, self._folder, self._config, self._warn = kind, folder, config, warn
        self.failed = False
        self._module = self._find()
        self._work: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._work.put(lambda: self._open(start_step))
        self._thread = threading.Thread(target=self._run, name=f"{kind} tracker", daemon=True)
        self._thread.start()

    def _find(self) -> Any:
        try:
            return import_package("torch.utils.tensorboard" if self.kind == "tensorboard" else self.kind)
        except ImportError:
            advice = f"pip install 'speedrun-mup[{self.kind}]'"
            raise ConfigError(f"track={self.kind} needs a package: {advice}") from None
        except Exception as fault:  # of a package that cannot be used here
            self._fail(in_a_line(fault))
            return None

    def _run(self) -> None:
        while not self.failed and (work := self._work.get()):
            try:
                work()
            except BaseException as fault:  # of foreign code, which may even call sys.exit
                self._fail(in_a_line(fault))

    def _fail(self, why: str) -> None:
        if not self.failed:
            self.failed = Tracker.abandoned = True
            fix = TRACKER_FIXES[self.kind]
            self._warn(
                f"warning: {self.kind} failed ({printable(why)}); continuing without it, metrics.jsonl has all; {fix}"
            )

    def _open(self, step: int) -> None:
        if self.kind == "tensorboard":
            own_folder(self._folder / "tensorboard")
            path = str(self._folder / "tensorboard")
            self._writer: Any = self._module.SummaryWriter(path, purge_step=step or None)
        else:
            self._writer = self._module.init(project="speedrun-mup", name=self._folder.name, config=self._config)

    def log(self, record: Mapping[str, Any]) -> None:
        """Mirror one record; its numbers are named kind/name."""
        step = record["step"]
        values = {f"{record['kind']}/{k}": v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        if self._work.qsize() > TRACKER_BACKLOG:
            self._fail(f"it is {TRACKER_BACKLOG:,} records behind")
        if not self.failed:
            self._work.put(lambda: self._log(values, step))

    def _log(self, values: Mapping[str, float], step: int) -> None:
        if self.kind == "tensorboard":
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        else:
            self._writer.log(values, step=step)

    def rewind(self, step: int) -> None:
        """What was mirrored of `step` and later will come again."""
        if self.kind == "tensorboard":
            self._work.put(self._end)
            self._work.put(lambda: self._open(step))

    def _end(self) -> None:
        self._writer.close() if self.kind == "tensorboard" else self._writer.finish()

    def close(self) -> None:
        """Flush and end; waits for TRACKER_WAIT_S at most."""
        if not self.failed:
            self._work.put(self._end)
        self._work.put(None)
        self._thread.join(TRACKER_WAIT_S)
        if self._thread.is_alive():
            self._fail(f"it did not end within {TRACKER_WAIT_S:g} s")
