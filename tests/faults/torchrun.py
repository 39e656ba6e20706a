"""Real runs under real torchrun, to be wounded from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from speedrun_mup.training.tracking import read_metrics

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 120


def until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait for `condition`. TimeoutError if it does not come."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience_s} s in vain")
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Torchrun:
    """`train.py` on `ranks` gloo ranks, its run folder `out`/run. A context that leaves no process behind."""

    def __init__(self, ranks: int, out: Path, flags: Sequence[str], launcher_flags: Sequence[str] = ()):
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *launcher_flags]
        launcher.append(f"--log-dir={out / 'torchrun'}")  # else it leaves one in the system's temporary folder
        self.folder, self._seen = out / "run", set[int]()
        self.process = subprocess.Popen(
            [*launcher, str(ROOT / "train.py"), *flags, "--out", str(out), "--name", "run"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *fault: object) -> None:
        self.workers()
        for pid in (self.process.pid, *self._seen):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()

    def workers(self) -> list[int]:
        """Process ids of the ranks that are alive, in order of rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = []
        for pid in map(int, children.read_text().split()) if children.exists() else ():
            with contextlib.suppress(OSError):
                variables = dict(
                    line.partition("=")[::2] for line in Path(f"/proc/{pid}/environ").read_text().split("\0")
                )
                if "RANK" in variables and is_alive(pid):
                    found.append((int(variables["RANK"]), pid))
        self._seen.update(pid for _, pid in found)
        return [pid for _, pid in sorted(found)]

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has recorded `step`, in this life or in one before."""

        def reached() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"ended too early: {self.process.communicate()[0]}")
            metrics = self.folder / "metrics.jsonl"
            return metrics.exists() and any(
                r["step"] >= step for r in read_metrics(self.folder) if r["kind"] == "train"
            )

        until(reached)
        self.workers()

    def end(self, patience_s: float = PATIENCE_S) -> tuple[int, str]:
        """The exit code of torchrun and what all processes said."""
        said, _ = self.process.communicate(timeout=patience_s)
        return self.process.returncode, said
