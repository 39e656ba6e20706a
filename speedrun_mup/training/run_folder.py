"""The folder of a run: who works in it, what it holds, and which one `--resume auto` takes.

A folder may be foreign: nothing here follows a link, waits for a FIFO, or ends in a traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from speedrun_mup.config import TrainConfig, settings
from speedrun_mup.config_file import from_json, to_json
from speedrun_mup.core.distributed import World
from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.files import FolderLock, open_to_append, printable, read_text, write_whole
from speedrun_mup.training.checkpoint import Checkpoints
from speedrun_mup.training.tracking import (
    CONFIG,
    LOG,
    METRICS,
    PROVENANCE,
    RunLog,
    attempts,
    launch,
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
    both = {name: [getattr(before, name), getattr(now, name)] for name in lasting if before}
    changed = {name: values for name, values in both.items() if values[0] != values[1]}
    attempt = provenance(sys.argv) | {"from_step": start, "changed": changed}
    try:
        with open_to_append(folder / PROVENANCE) as file:
            file.write(json.dumps(attempt) + "\n")
    except OSError as fault:
        raise _cannot_write(cfg, folder, fault) from None
    if changed or not before:
        write_whole(folder / CONFIG, to_json(now) + "\n", "choose another folder with --out")


def _cannot_write(cfg: TrainConfig, folder: Path, fault: OSError) -> ConfigError:
    where = printable(fault.filename or folder)
    advice = "continue in a copy of its folder, with --resume" if cfg.resume else "choose another with --out"
    return ConfigError(f"{where} cannot be written ({fault.strerror}); {advice}")


# ---------------------------------------------------------------------------------------------------------------------
# The run that is in it
# ---------------------------------------------------------------------------------------------------------------------


def saved_config(folder: Path) -> TrainConfig:
    """The settings of the run in `folder`. ConfigError if there are none."""
    path = folder / CONFIG
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise ConfigError(f"{printable(folder)} holds no run (no {CONFIG}); {_runs_near(folder)}") from None
    except OSError as fault:
        raise ConfigError(f"{printable(path)} cannot be read ({fault.strerror}); give a run's folder") from None
    return from_json(text, path)


def _runs_near(folder: Path) -> str:
    """What may have been meant by a folder that is no run: one that it holds, or one of a name like it."""
    with contextlib.suppress(OSError):
        inside = sorted(path.parent for path in folder.glob("*/checkpoints"))
        beside = [path.parent for place in (folder.parent, Path("runs")) for path in place.glob("*/checkpoints")]
        near = difflib.get_close_matches(folder.name, {path.name for path in beside}, n=3)
        meant = inside[:8] or [next(path for path in beside if path.name == name) for name in near]
        if meant:
            return f"did you mean {' or '.join(map(printable, meant))}?"
    return "give a run's folder"


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` came to its end, the last validation included."""
    return read_status(folder)["status"] == "finished"


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


def newest_finished(out: Path) -> Path | None:
    """The newest run in `out`, if it is finished."""
    newest = next(iter(_runs(out)), None)
    return newest if newest and is_finished(newest) else None


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


def run_of_launch(out: Path) -> Path | None:
    """The run folder in `out` that this torchrun was the last to work in; what its ranks resume after a restart."""
    return next(
        (folder for folder in _runs(out) if [attempt.get("launch") for attempt in attempts(folder)[-1:]] == [launch()]),
        None,
    )


def _runs(out: Path) -> Iterator[Path]:
    """The folders in `out` that hold something called config.json, the last started first."""
    started = {}
    for folder in out.glob("*"):
        with contextlib.suppress(OSError):
            started[folder] = (folder / CONFIG).lstat().st_mtime
    yield from sorted(started, key=started.__getitem__, reverse=True)
