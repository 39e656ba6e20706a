"""Programs that write a folder for each run, with its settings in one file and its curves in another.

Hugging Face's Trainer, Lightning's CSV logger, Ray Tune, and any program with a JSONL or CSV file of curves.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from speedrun_mup.files import open_regular, printable, read_json
from speedrun_mup.transfer.points import TransferError
from speedrun_mup.transfer.sources.logs import STEPS, LoggedRun, flat, json_lines, run_name, settings_beside
from speedrun_mup.transfer.sources.text import TextRows

STATE = "trainer_state.json"
_RAY = ("result.json", "progress.csv")
_MEAN = "train_loss"  # of the Trainer: a mean over the whole run, logged once


def is_trainer(path: Path) -> bool:
    """Whether a file is what Hugging Face's Trainer writes beside its checkpoints."""
    return path.name == STATE


def is_ray(path: Path) -> bool:
    """Whether a file holds the results of a trial of Ray Tune."""
    return path.name in _RAY and (path.parent / "params.json").is_file()


def is_lightning(path: Path) -> bool:
    """Whether a file is that of Lightning's CSV logger."""
    beside = (path.parent / "hparams.yaml").is_file() or re.fullmatch(r"version_\d+", path.parent.name)
    return path.name == "metrics.csv" and bool(beside)


def is_curves(path: Path) -> bool:
    """Whether a file may hold curves of a run: its records have steps."""
    if path.suffix not in (".jsonl", ".csv"):
        return False
    try:
        with open_regular(path) as file:
            head = file.read(2**16).split(b"\n")[0].decode("utf-8-sig", "replace")
        names = json.loads(head) if path.suffix == ".jsonl" else re.split(r"[,;\t|]", head.lower())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(names, dict | list) and any(str(name).strip('" \r') in STEPS for name in names)


def read_trainer(files: Sequence[Path], root: Path) -> Iterator[LoggedRun]:
    """Runs of Hugging Face's Trainer: of each the checkpoint that got furthest."""
    states: dict[Path, list[tuple[int, Path, dict[str, Any]]]] = defaultdict(list)
    for path in files:
        state = read_json(path, "give what the Trainer wrote", TransferError)
        history = state.get("log_history") if isinstance(state, dict) else None
        if not isinstance(history, list) or not all(isinstance(record, dict) for record in history):
            raise TransferError(f"{printable(path)}: no log_history; give what the Trainer wrote")
        folder = path.parent
        folder = folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder
        step = state.get("global_step")
        states[folder].append((step if isinstance(step, int) else 0, path, state))
    for folder, some in states.items():
        _, path, state = max(some, key=lambda one: one[0])
        settings = settings_beside(path.parent) | settings_beside(folder)
        settings |= dict(
            flat({name: value for name, value in state.items() if name not in ("log_history", "trial_params")})
        )
        settings |= dict(flat(state.get("trial_params") or {}))
        run = LoggedRun(run_name(folder, root), settings)
        for number, record in enumerate(state["log_history"]):
            run.log({name: value for name, value in record.items() if name != _MEAN}, number)
        yield run


def read_ray(files: Sequence[Path], root: Path) -> Iterator[LoggedRun]:
    """Trials of Ray Tune."""
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        folders[path.parent].append(path)
    for folder, some in folders.items():
        run = LoggedRun(run_name(folder, root), settings_beside(folder))
        run.state = "failed" if (folder / "error.txt").is_file() else ""
        lines = next((path for path in some if path.suffix == ".json"), None)
        records = [record for _, record in json_lines(lines)] if lines else [*_csv_records(some[0])]
        for number, record in enumerate(records):
            run.log({name: value for name, value in record.items() if name.partition("/")[0] != "config"}, number)
        yield run


def read_curves(files: Sequence[Path], root: Path) -> Iterator[LoggedRun]:
    """Runs by a file of curves in each one's folder, or several such files in one folder."""
    folders = [path.parent for path in files]
    for path in files:
        lone = folders.count(path.parent) == 1
        run = LoggedRun(run_name(path.parent if lone else path.with_suffix(""), root), settings_beside(path.parent))
        records = [record for _, record in json_lines(path)] if path.suffix == ".jsonl" else [*_csv_records(path)]
        for number, record in enumerate(records):
            run.log(record, number)
        yield run


def _csv_records(path: Path) -> Iterator[dict[str, Any]]:
    rows = TextRows(path)
    header = [name.strip() for name in rows.header]
    for where, cells in rows:
        if len(cells) < len(header):
            raise TransferError(f"{where}: {len(cells)} values below a header of {len(header)}")
        yield {name: cell for name, cell in zip(header, cells) if cell}
