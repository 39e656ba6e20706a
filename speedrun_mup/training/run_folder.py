"""The folder of a run: who works in it, whether a run can resume in it, and which one `--resume auto` takes.

A folder may be foreign: nothing here follows a link, waits for a FIFO, or ends in a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from speedrun_mup.config import TrainConfig, from_json, known_settings, settings, to_json
from speedrun_mup.core.distributed import World
from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.data.shards import Corpus
from speedrun_mup.files import FolderLock, open_to_append, printable, read_text, write_whole
from speedrun_mup.training.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint
from speedrun_mup.training.tracking import (
    CONFIG,
    LOG,
    METRICS,
    PROVENANCE,
    RunLog,
    launch,
    lives,
    provenance,
    read_metrics,
    read_status,
)

LINES = 8  # about folders that --resume auto leaves out


# ---------------------------------------------------------------------------------------------------------------------
# A run at work in it
# ---------------------------------------------------------------------------------------------------------------------


class RunFolder:
    """The folder that a run works in, and on rank 0 its lock; from `open_log` on, its log.

    Args:
        cfg: the settings of the run: a new folder is made, or that of `resume` reopened.
        world: all its ranks make one.
        lock: rank 0's of the folder to resume, if it holds it already; `close` closes it.

    Raises:
        ConfigError: on all ranks, if the folder is in use, holds a run already, or cannot be written.
    """

    log: RunLog

    def __init__(self, cfg: TrainConfig, world: World, lock: FolderLock | None = None):
        self.world, self.lock = world, lock

        def open_it() -> Path:
            if lock:
                return lock.find()
            self.lock = _open_folder(cfg)
            return self.lock.folder

        self.path = world.on_main(open_it)

    def open_log(self, cfg: TrainConfig, start: int) -> None:
        """Open the log of a run from step `start`; then write its provenance and config.json, with which a run exists.

        A resumed run's config.json gets what the resume changed for good. Raises ConfigError on all ranks.
        """

        def open_it() -> RunLog:
            main, values = self.world.is_main, dataclasses.asdict(cfg)
            log = RunLog(self.path, cfg.schedule, start, main, cfg.progress, cfg.track, values)
            if main:
                _note_start(cfg, self.path, start)
            return log

        self.log = self.world.on_all(open_it)

    def find(self) -> bool:
        """Have rank 0's log write where the folder is now. False if that is not known, so that another's is left alone."""
        if self.lock:
            try:
                self.log.move(self.lock.find())
            except UserError:
                return False
        return True

    def follow(self) -> Path:
        """Continue in the folder under its new name, if it was renamed; returns it. UserError on all ranks if it is lost."""
        found = self.world.on_main(lambda: self.lock.find() if self.lock else self.path)
        if found != self.path:
            self.log.move(found)
            self.log.say(f"{printable(self.path)} was renamed to {printable(found)}; the run continues there")
            self.path = found
        return found

    def write_status(self, status: str, why: str | None = None) -> None:
        """Write status.json, because torchrun hides the exit codes of its ranks.

        status: running, finished, stopped, diverged, failed.
        """
        if self.find():
            self.log.write_status(status, why)

    def close(self) -> None:
        """Close the log and let others into the folder."""
        self.log.close()
        if self.lock:
            self.lock.close()


def _open_folder(cfg: TrainConfig) -> FolderLock:
    """Make or, to resume, reopen the run's folder, and lock it."""
    moment = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(3).hex()}"
    made = f"{cfg.parametrization}-w{cfg.width}-s{cfg.seed}-{moment}"
    folder = Path(cfg.resume) if cfg.resume else Path(cfg.out) / (cfg.name or made)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
    except OSError as fault:
        raise _cannot_write(cfg, folder, fault) from None
    if not cfg.resume and os.path.lexists(folder / CONFIG):
        lock.close()
        raise ConfigError(f"{folder} already holds a run; --resume {folder} continues it, --name starts another")
    return lock


def _note_start(cfg: TrainConfig, folder: Path, start: int) -> None:
    """Write provenance.json and config.json."""
    before = saved_config(folder) if cfg.resume else None
    lasting = [name for name, meta in settings().items() if meta.lasts]
    now = dataclasses.replace(before, **{name: getattr(cfg, name) for name in lasting}) if before else cfg
    changed = {name: [getattr(before, name), getattr(now, name)] for name in lasting if before and before != now}
    life = provenance(sys.argv) | {
        "from_step": start,
        "changed": {k: v for k, v in changed.items() if v[0] != v[1]},
    }
    try:
        with open_to_append(folder / PROVENANCE) as file:
            file.write(json.dumps(life) + "\n")
    except OSError as fault:
        raise _cannot_write(cfg, folder, fault) from None
    if now != before:
        write_whole(folder / CONFIG, to_json(now) + "\n", "choose another folder with --out")


def _cannot_write(cfg: TrainConfig, folder: Path, fault: OSError) -> ConfigError:
    where = printable(fault.filename or folder)
    advice = "continue in a copy of its folder, with --resume" if cfg.resume else "choose another with --out"
    return ConfigError(f"{where} cannot be written ({fault.strerror}); {advice}")


# ---------------------------------------------------------------------------------------------------------------------
# Whether a run can resume in it
# ---------------------------------------------------------------------------------------------------------------------


def saved_config(folder: Path) -> TrainConfig:
    """The settings of the run in `folder`. ConfigError if there are none."""
    path = folder / CONFIG
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no run (no {CONFIG}); give a run's folder") from None
    except OSError as fault:
        raise ConfigError(f"{printable(path)} cannot be read ({fault.strerror}); give a run's folder") from None
    return from_json(text, path)


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` came to its end, the last validation included."""
    return read_status(folder)["status"] == "finished"


_STATE: dict[str, Any] = {  # what a checkpoint says about its run
    "step": int,
    "train_s": int | float,
    "data_offset": int,
    "skipped_micro_batches": int,
    "val_loss": int | float | None,
    "losses": list,
    "optimizer_steps": dict,
    "corpus": str,
    "config": dict,
}


def checked_state(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state in the checkpoint `path`, which may be anybody's. DamagedCheckpoint unless a run could have written it."""
    lists = {name: state.get(name) for name in ("losses", "optimizer_steps")}
    steps = lists["optimizer_steps"]
    counts = [state.get(name) for name in ("step", "data_offset", "skipped_micro_batches")]
    counts += [*(steps.values() if isinstance(steps, dict) else ())]
    wrong = [name for name, kind in _STATE.items() if not isinstance(state.get(name, ()), kind)]
    wrong += ["a count"] * any(type(count) is not int or not 0 <= count < 2**53 for count in counts)
    if not wrong:
        numbers = [*state["losses"], state["train_s"], state["val_loss"] or 0.0]
        wrong = ["a number"] * any(type(number) not in (int, float) or not abs(number) < 1e300 for number in numbers)
        wrong += ["iterations"] * (type(state["config"].get("iterations")) is not int)
    if wrong:
        raise DamagedCheckpoint(
            f"{printable(path)}: its state has no right {wrong[0]}; remove it, or restore it from a copy"
        )
    return state


def check_resumable(cfg: TrainConfig, corpus: Corpus, state: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError listing every setting that differs from those that `path` was made with.

    A run may get longer; `told_of_extension` says what that means.
    """
    if not state["corpus"]:
        raise CheckpointError(
            f"{path} was imported, without what its optimizers held; begin a run with --init-from {path}"
        )
    now, before = vars(cfg), known_settings(state["config"])
    fixed = [key for key, meta in settings().items() if meta.must_match and before[key] != now[key]]
    if longer := is_longer(before["iterations"], cfg.iterations):
        fixed.remove("iterations")
    differ = [f"{key} was {printable(before[key])}, is {now[key]}" for key in fixed]
    if not corpus.is_known_as(state["corpus"]):
        differ.append("the corpus is not the same")
    if longer and not fixed:
        shorter = dataclasses.replace(cfg, iterations=before["iterations"]).schedule
        if not cfg.schedule.agrees(shorter, state.get("step", 0)):
            differ.append(
                f"iterations was {before['iterations']}, is {cfg.iterations}, which moves stages that it went through"
            )
    if differ:
        raise CheckpointError(f"{path} belongs to another run: {'; '.join(differ)}; resume without changing these")


def is_longer(before: Any, now: int) -> bool:
    """Whether a run of `before` steps is extended by asking for `now`."""
    return isinstance(before, int) and before < now


def told_of_extension(before: int, cfg: TrainConfig, start: int) -> str:
    """What it does to the schedules that a run of `before` steps continues to `cfg.iterations` from step `start`."""
    now, cooled = cfg.iterations, math.ceil(before * (1 - cfg.cooldown))
    said = (
        f"extended from {before} to {now} steps: the attention window and the cooldown of the learning rate, now from step "
        f"{math.ceil(now * (1 - cfg.cooldown))}, are laid over the new length"
    )
    if start <= cooled:
        return f"{said}; up to step {start} the learning rate was that of the longer run too"
    fell, rises = (dataclasses.replace(cfg, iterations=length).schedule.at(start).lr_factor for length in (before, now))
    return (
        f"{said}; step {start} lies in the old cooldown, where the learning rate had fallen to {fell:.2f} of its peak, and "
        f"it continues at {rises:.2f}: the result is not that of {now} steps from the start; for that, start again, or "
        f"delete the checkpoints after step {cooled} if an older one was kept (--keep-every), and resume"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Which one
# ---------------------------------------------------------------------------------------------------------------------


def claim_unfinished(
    out: Path, wanted: Mapping[str, Any] | None = None, say: Callable[[str], None] = lambda line: None
) -> FolderLock | None:
    """Lock the run folder in `out` that `--resume auto` takes.

    Args:
        out: the folder that holds run folders.
        wanted: settings that the run must have, as far as they change what it computes.
        say: gets a line for each unfinished run that is left out: in use, of other settings, or not to be read.

    Returns:
        The lock of the newest run that is unfinished, not in use, of these settings and readable; None if there is none.
    """
    left_out = 0
    for folder in _runs(out):
        try:
            lock = _claim(folder, wanted or {})
        except (UserError, OSError) as fault:
            left_out += 1
            if left_out <= LINES:
                say(f"--resume auto leaves out {printable(folder)}: {printable(_why(fault), 400)}")
            continue
        if lock:
            return lock
    if left_out > LINES:
        say(f"--resume auto leaves out {left_out - LINES} more")
    return None


def _claim(folder: Path, wanted: Mapping[str, Any]) -> FolderLock | None:
    """The lock of `folder`, or None if its run is at its end. UserError or OSError if it cannot be gone on with."""
    if is_finished(folder):
        return None
    saved = vars(saved_config(folder))
    differ = [f"{name} is {saved[name]}, not {value}" for name, value in wanted.items() if _differs(name, saved, value)]
    if differ:
        raise ConfigError(f"it has other settings: {'; '.join(differ)}")
    lock = FolderLock(folder)
    try:
        status = read_status(folder)
        if status["status"] == "finished":  # meanwhile
            lock.close()
            return None
        if status["status"] == "diverged":
            raise ConfigError(f"it diverged; to resume it all the same, --resume {folder}")
        for name in (PROVENANCE, METRICS, LOG):
            open_to_append(folder / name).close()
        read_metrics(folder)
        Checkpoints(folder / "checkpoints", World()).newest(lambda line: None)
    except BaseException:
        lock.close()
        raise
    return lock


def _differs(name: str, saved: Mapping[str, Any], value: Any) -> bool:
    """Whether a run that was saved with other settings is another run, by the setting `name`."""
    meta = settings().get(name)
    if meta is None or saved[name] == value or not (meta.must_match or meta.lasts):
        return False
    return name != "data" or os.path.realpath(saved[name]) != os.path.realpath(value)


def _why(fault: Exception) -> str:
    return str(fault) if isinstance(fault, UserError) else getattr(fault, "strerror", None) or str(fault)


def newest_unfinished(out: Path) -> Path | None:
    """The run folder in `out` that `--resume auto` would take."""
    lock = claim_unfinished(out)
    if lock is None:
        return None
    lock.close()
    return lock.folder


def run_of_launch(out: Path) -> Path | None:
    """The run folder in `out` that this torchrun was the last to work in; what its ranks resume after a restart."""
    return next(
        (folder for folder in _runs(out) if [life.get("launch") for life in lives(folder)[-1:]] == [launch()]), None
    )


def _runs(out: Path) -> Iterator[Path]:
    """The folders in `out` that hold something called config.json, the last started first."""
    started = {}
    for folder in out.glob("*"):
        with contextlib.suppress(OSError):
            started[folder] = (folder / CONFIG).lstat().st_mtime
    yield from sorted(started, key=started.__getitem__, reverse=True)
