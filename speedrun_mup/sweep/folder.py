"""The folder of a sweep: sweep.json, results, the table of runs as CSV. Only the holder of its lock writes there."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from speedrun_mup.config import computed_settings, known_settings, present_names, swept_settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.shards import Corpus
from speedrun_mup.files import own_folder, printable, read_bytes, write_whole
from speedrun_mup.sweep.result import CellResult, place_of
from speedrun_mup.sweep.spec import SCHEMA, Cell, Sweep
from speedrun_mup.training.run_folder import FolderLock
from speedrun_mup.transfer import MADE_WITH, Axes

SWEEP, CELLS, RESULT, SCRATCH = "sweep.json", "cells", "result.json", "running"
MOST_RUNS = 10**6


@contextmanager
def open_folder(out: Path) -> Iterator[Path]:
    """Hold `out` against other processes; yields a scratch folder in it, which is empty before and gone afterwards."""
    scratch = out / SCRATCH
    try:
        out.mkdir(parents=True, exist_ok=True)
        own_folder(out / CELLS)
        lock = FolderLock(out, "--out")
    except OSError as fault:
        raise ConfigError(f"{printable(out)} cannot be written ({fault.strerror}); choose another --out") from None
    with closing(lock):
        shutil.rmtree(scratch, ignore_errors=True)
        if scratch.is_symlink() or scratch.exists():
            raise ConfigError(f"{printable(scratch)} is no folder of this sweep's; delete it")
        for torn in out.glob(f"{CELLS}/*/.{RESULT}.*"):  # half-written, by a process that was killed
            torn.unlink(missing_ok=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def check_and_record(sweep: Sweep, out: Path, corpus: Corpus) -> str:
    """Add what is asked to sweep.json; returns the corpus's fingerprint there, which earlier versions may have written.

    Raises ConfigError if the cells there have another base, data or arm.
    """
    path = out / SWEEP
    axes = {"width", "seed", "parametrization"}
    settings = {name: value for name, value in computed_settings(sweep.base).items() if name not in axes}
    base = {"schema": SCHEMA, "knob": sweep.knob, "corpus": corpus.fingerprint, **settings}
    arms = {arm.name: {"settings": dict(arm.settings), "predicted": arm.predicted} for arm in sweep.arms}
    asked: dict[str, Any] = {name: list(getattr(sweep, name)) for name in ("widths", "octaves", "seeds")}
    asked |= {"arms": list(arms), "adaptive": sweep.adaptive, "refine": sweep.refine}
    before: dict[str, Any] = read_definition(out) if path.exists() else {"base": base, "arms": {}, "asked": []}
    known = known_settings(before["base"])
    if corpus.is_known_as(known.get("corpus", "")):
        base["corpus"] = known["corpus"]
    differ = [f"{key} was {printable(known.get(key))}, is {base[key]}" for key in base if known.get(key) != base[key]]
    differ += [f"arm {name} was another" for name in arms if before["arms"].get(name, arms[name]) != arms[name]]
    if differ:
        raise ConfigError(f"{out} holds another sweep: {'; '.join(differ)}; choose another folder")
    requests = before["asked"] + ([] if asked in before["asked"] else [asked])
    after = before | {"base": base, "arms": before["arms"] | arms, "asked": requests}
    write_file(path, json.dumps(after, indent=1, allow_nan=False) + "\n")
    return base["corpus"]


def note_failed(out: Path, cells: Iterable[Cell]) -> None:
    """Add cells that were given up to sweep.json: points by which a grid grew are in no request."""
    definition = read_definition(out)
    failed = definition.get("failed", [])
    more = [
        place for place in ([cell.arm, cell.width, cell.octaves, cell.seed] for cell in cells) if place not in failed
    ]
    if more:
        content = json.dumps(definition | {"failed": failed + more}, indent=1, allow_nan=False)
        write_file(out / SWEEP, content + "\n")


def write_file(path: Path, text: str) -> None:
    """Replace a file of a sweep's folder, which may have come from somebody else. Raises ConfigError."""
    try:
        own_folder(path.parent)
    except OSError as fault:
        raise ConfigError(f"{printable(path.parent)} cannot be used ({fault.strerror}); delete it") from None
    write_whole(path, text, "make room and run the same command again")


def read_definition(out: Path) -> dict[str, Any]:
    """The sweep.json of a folder: base, arms, asked. Raises ConfigError if there is none."""
    path = out / SWEEP
    try:
        definition = json.loads(read_bytes(path))
        base, arms, asked = (definition[name] for name in ("base", "arms", "asked"))
        for arm in arms.values():
            arm["settings"] = present_names(arm["settings"])
        drifts = [arm["predicted"] for arm in arms.values()]
        good = isinstance(base["base_width"], int) and base["knob"] in swept_settings() and all(map(_is_request, asked))
        good = good and all(drift is None or math.isfinite(drift) for drift in drifts)
        good = good and all(name == printable(name, 100) for name in arms)
        good = good and all(map(_is_place, definition.get("failed", [])))
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
        good = False
    if not good:
        raise ConfigError(f"{printable(path)} is missing or damaged; give the folder of a sweep")
    return definition


def _is_request(asked: Mapping[str, Any]) -> bool:
    """Whether this is an entry of "asked" in a sweep.json, of a size that somebody may have meant."""
    axes = [asked[name] for name in ("widths", "seeds", "octaves", "arms")]
    numbers = [*asked["widths"], *asked["seeds"], *asked["octaves"]]
    sane = all(isinstance(number, (int, float)) and abs(number) < 2**63 for number in numbers)
    return sane and math.prod(map(len, axes)) <= MOST_RUNS and all(isinstance(arm, str) for arm in asked["arms"])


def _is_place(entry: Sequence[Any]) -> bool:
    """Whether this is an entry of "failed" in a sweep.json: arm, width, octaves, seed."""
    arm, width, octaves, seed = entry
    return isinstance(arm, str) and type(width) is type(seed) is int and math.isfinite(octaves)


def read_results(out: Path) -> list[CellResult]:
    """All finished cells of a folder, by arm, width, learning rate and seed. Raises ConfigError for a damaged one."""
    results = []
    for path in out.glob(f"{CELLS}/*/{RESULT}"):
        try:
            result = CellResult.from_json(read_bytes(path), path)
        except OSError as fault:
            raise ConfigError(f"{printable(path)} cannot be read ({fault.strerror}); delete it") from None
        if result.id != path.parent.name:
            raise ConfigError(f"{printable(path)} is the result of another run, {printable(result.id, 20)}; delete it")
        results.append(result)
    return sorted(results, key=place_of)


COLUMNS = ("arm", "width", "lr", "log2_lr", "seed", "loss", "diverged", "train_loss", "seconds", "flops", *MADE_WITH)


def write_csv(out: Path, path: Path) -> None:
    """The finished runs as a table that `transfer.read_points` reads; losses are nan where a run diverged.

    The factor on the hyperparameter is in the column lr, or, if that is no learning rate, in one that `axes_of` names.
    """
    axes = axes_of(read_definition(out))
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(name.replace("lr", axes.short) for name in COLUMNS)
    for cell in read_results(out):
        loss = math.nan if cell.diverged else cell.loss
        place = (cell.arm, cell.width, cell.lr, cell.octaves, cell.seed)
        cost = (round(cell.seconds, 3), f"{cell.flops:.6g}")
        made = (cell.made_with.get(name, "") for name in MADE_WITH)
        writer.writerow([*place, loss, int(cell.diverged), cell.train_loss, *cost, *made])
    write_whole(path, file.getvalue())


def axes_of(definition: Mapping[str, Any]) -> Axes:
    """The axes of a sweep: a factor on learning rates goes by their setting's name, one on another by NAME_factor."""
    axes = Axes("width", definition["base"]["knob"])
    return axes if axes.is_rate else Axes(axes.size, f"{axes.hyperparameter}_factor")


def tuned_flag(definition: Mapping[str, Any], arm: str) -> tuple[str, float]:
    """The flag for what the sweep tuned, and its value where the factor is 1: ("--lr-scale", 1.0)."""
    name = definition["base"]["knob"]
    return f"--{name.replace('_', '-')}", (definition["base"] | definition["arms"][arm]["settings"])[name]
