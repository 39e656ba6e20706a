"""Runs from other programs: what a file or a folder holds is found out here, and read into rows with one run each.

A new format is one entry of FORMATS: a function that says whether a file is one of its own, and one that reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speedrun_mup.files import SMALL, open_regular, printable
from speedrun_mup.transfer.points import TransferError
from speedrun_mup.transfer.sources import databases, run_folders, tensorboard, wandb_runs
from speedrun_mup.transfer.sources.json_lines import read_json_table
from speedrun_mup.transfer.sources.logs import LAST, LoggedRun, Rows, rows_of
from speedrun_mup.transfer.sources.text import TextRows

MOST_FILES = 200_000
SWEEP = "sweep.json"  # of our own sweeps, which are no logs


@dataclass(frozen=True)
class Format:
    """A program's logs.

    Args:
        words: What they are, for a reader.
        owns: Whether a file is one of them.
        read: The files, and the folder that was given, -> runs.
        also: Role -> what it calls it, beyond the names that are known.
        alone: Whether one of its files, named by itself, is meant as this; a CSV file that is named is a table.
    """

    words: str
    owns: Callable[[Path], bool]
    read: Callable[[Sequence[Path], Path], Iterable[LoggedRun]]
    alone: bool = True
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# The first that finds files of its own reads a folder: many programs write TensorBoard files besides their own.
FORMATS: dict[str, Format] = {
    "wandb": Format("runs of W&B", wandb_runs.is_wandb, wandb_runs.read_wandb),
    "ray": Format("trials of Ray Tune", run_folders.is_ray, run_folders.read_ray, alone=False),
    "trainer": Format("runs of Hugging Face's Trainer", run_folders.is_trainer, run_folders.read_trainer),
    "lightning": Format("runs of Lightning", run_folders.is_lightning, run_folders.read_curves, alone=False),
    "optuna": Format("trials of Optuna", databases.is_optuna, databases.read_optuna, also={"loss": ("value",)}),
    "trackio": Format("runs of trackio", databases.is_trackio, databases.read_trackio),
    "tensorboard": Format("TensorBoard event files", tensorboard.is_events, tensorboard.read_events),
    "curves": Format("files of curves", run_folders.is_curves, run_folders.read_curves, alone=False),
}


def read_source(path: Path, which: str = "", names: str = "", form: str = "", most: int = SMALL) -> Rows:
    """The runs in a file or below a folder.

    Args:
        path: A table as text or JSON, a file of one of FORMATS, or a folder of any number of these.
        which: Value of a curve that stands for a run, "last" or "min".
        names: Pattern of the names of logged runs, such as w{width}-lr{lr}; "" for none.
        form: One of FORMATS, where a folder has several.
        most: Bytes of a table.

    Raises:
        TransferError: In one line, for what cannot be read.
    """
    if form and form not in FORMATS:
        raise TransferError(f"--format {printable(form, 40)}: give one of {', '.join(FORMATS)}")
    found = logs_in(path)
    if form and form not in found:
        have = f"it has {', '.join(FORMATS[name].words for name in found)}" if found else "it has no logs"
        raise TransferError(f"--format {form}: no {FORMATS[form].words} in {printable(path)}; {have}")
    if not found:
        return _table(path, most)
    name = form or next(iter(found))
    root = path if path.is_dir() else path.parent
    runs = sorted(FORMATS[name].read(found[name], root), key=lambda run: run.name)
    if not runs:
        raise TransferError(f"{printable(path)}: {FORMATS[name].words}, but without any run")
    rows = rows_of(runs, FORMATS[name].words, path, which or LAST, names)
    rows.also = FORMATS[name].also
    if others := [other for other in found if other not in (name, "curves")]:
        rows.notes.append(
            f"also there: {', '.join(FORMATS[o].words for o in others)}; --format {others[0]} reads these"
        )
    return rows


def logs_in(path: Path) -> dict[str, list[Path]]:
    """Format -> its files, of a file or below a folder; of none, and of a folder with a sweep of ours, nothing."""
    if not path.is_dir():
        name = next((name for name, form in FORMATS.items() if form.alone and form.owns(path)), None)
        return {name: [path]} if name else {}
    if (path / SWEEP).exists():
        return {}
    files = _files(path)
    found: dict[str, list[Path]] = {}
    for name, form in FORMATS.items():
        if name != "curves" or not any(found.values()):
            found[name] = [file for file in files if form.owns(file)]
    return {name: some for name, some in found.items() if some}


def _files(folder: Path) -> list[Path]:
    """Every file below a folder, in order, without hidden ones and what lies behind links to folders."""
    files: list[Path] = []
    for at, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        files += [Path(at, name) for name in sorted(names) if not name.startswith(".")]
        if len(files) > MOST_FILES:
            raise TransferError(f"{printable(folder)}: more than {MOST_FILES:,} files; name a folder with fewer")
    return files


def is_sweep(path: Path) -> bool:
    """Whether a folder is to be read as a sweep of ours, also a damaged one: any that holds no logs of other programs."""
    return path.is_dir() and not logs_in(path)


def _table(path: Path, most: int) -> Rows:
    try:
        with open_regular(path) as file:
            head = file.read(1000).lstrip()
    except OSError:
        head = b""  # the reader says why
    if head.startswith((b"{", b"[")):
        return read_json_table(path, head.startswith(b"["), most)
    return TextRows(path, most)
