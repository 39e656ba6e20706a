"""The folder of a sweep: sweep.json, results, the table of runs as CSV. Only the holder of its lock writes there."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speedrun_mup.config import known_settings, present_names, swept_settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.editions import missing_settings
from speedrun_mup.files import own_folder, printable, read_bytes, write_whole
from speedrun_mup.sweep.any_sweep import AnyRun, AnySweep
from speedrun_mup.sweep.result import RESULT, RUNS, SCHEMA, Place, RunResult, place_of
from speedrun_mup.sweep.spec import can_be_swept, varied_settings
from speedrun_mup.training.run_folder import FolderLock
from speedrun_mup.transfer import MADE_WITH, Axes
from speedrun_mup.transfer.points import whole_arm

SWEEP, SCRATCH = "sweep.json", "running"
MOST_RUNS = 10**6


@contextmanager
def open_folder(out: Path) -> Iterator[Path]:
    """Hold `out` against other processes; yields a scratch folder in it, which is empty before and gone afterwards."""
    scratch = out / SCRATCH
    try:
        out.mkdir(parents=True, exist_ok=True)
        own_folder(out / RUNS)
        lock = FolderLock(out, "--out")
    except OSError as fault:
        raise ConfigError(f"{printable(out)} cannot be written ({fault.strerror}); choose another --out") from None
    with closing(lock):
        shutil.rmtree(scratch, ignore_errors=True)
        if scratch.is_symlink() or scratch.exists():
            raise ConfigError(f"{printable(scratch)} does not belong to this sweep; delete it")
        for torn in out.glob(f"{RUNS}/*/.{RESULT}.*"):  # half-written, by a process that was killed
            torn.unlink(missing_ok=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def check_and_record(sweep: AnySweep, out: Path, data: Any) -> Any:
    """Add what is asked to sweep.json. Returns `data`, from `sweep.check`, as they are called there.

    Raises ConfigError if the runs there have another base, data or arm.
    """
    path = out / SWEEP
    axes: dict[str, Any] = asdict(sweep.axes) | {"size": sweep.size_names[0]}
    axes |= {"sizes": list(sweep.size_names)} if len(sweep.size_names) > 1 else {}
    axes |= {"trainer": sweep.trainer} if sweep.trainer else {}
    arms: dict[str, dict[str, Any]] = {
        arm.name: {"settings": dict(arm.settings), "predicted": arm.predicted} for arm in sweep.arms
    }
    for name, drifts in sweep.predicted.items():
        arms[name]["predicted_over"] = drifts
    asked: dict[str, Any] = {name: list(getattr(sweep, name)) for name in ("log2_factors", "seeds")}
    asked |= {"sizes": list(map(_entry, sweep.places))}
    asked |= {"arms": list(arms), "adaptive": sweep.adaptive, "refine": sweep.refine}
    before: dict[str, Any] = read_definition(out) if path.exists() else {"base": {}, "arms": {}, "asked": []}
    known: dict[str, Any] = before["base"]
    if known and not trainer_of(before):
        known = known_settings(known)
    base: dict[str, Any] = {"schema": SCHEMA, **axes, **sweep.definition(data, known)}
    known = known or base
    if trainer_of(before) != sweep.trainer and before["asked"]:
        raise ConfigError(f"{out} holds a sweep of another trainer than this one's; choose another --out")
    # where every arm, of now and before, has a value of its own, that of the base counts for nothing
    fixed = set.intersection(*({*arm["settings"]} for arm in (before["arms"] | arms).values()))
    base |= {key: known[key] for key in fixed & base.keys() & known.keys()}
    told = {key: base.get(key) for key in (*base, "sizes", "held_tokens", "trainer")}
    differ = [f"{key} was {printable(known.get(key))}, is {told[key]}" for key in told if known.get(key) != told[key]]
    differ += [f"arm {name} was another" for name in arms if before["arms"].get(name, arms[name]) != arms[name]]
    if differ:
        raise ConfigError(
            f"{out} holds another sweep: {'; '.join(differ)}; give what it was made with, or choose another folder"
        )
    requests = before["asked"] + ([] if asked in before["asked"] else [asked])
    after = before | {"base": base, "arms": before["arms"] | arms, "asked": requests}
    replace_file(path, json.dumps(after, indent=1, allow_nan=False) + "\n")
    return sweep.as_recorded(data, base)


def note_failed(out: Path, specs: Iterable[AnyRun]) -> None:
    """Add runs that were given up to sweep.json: points by which a grid grew are in no request."""
    definition = read_definition(out)
    failed = definition.get("failed", [])
    places = ([spec.arm, _entry(spec.place), spec.log2_factor, spec.seed] for spec in specs)
    more = [place for place in places if place not in failed]
    if more:
        content = json.dumps(definition | {"failed": failed + more}, indent=1, allow_nan=False)
        replace_file(out / SWEEP, content + "\n")


def replace_file(path: Path, text: str) -> None:
    """Replace a file of a sweep's folder, which another program may have written. Raises ConfigError."""
    try:
        own_folder(path.parent)
    except OSError as fault:
        raise ConfigError(f"{printable(path.parent)} cannot be used ({fault.strerror}); delete it") from None
    write_whole(path, text, "make room and run the same command again")


def read_definition(out: Path) -> dict[str, Any]:
    """The sweep.json of a folder: base, arms, asked. Raises ConfigError if there is none."""
    path = out / SWEEP
    try:
        definition = _of_this_edition(json.loads(read_bytes(path)))
        base, arms, asked = (definition[name] for name in ("base", "arms", "asked"))
        for arm in arms.values():
            arm["settings"] = present_names(arm["settings"])
        drifts = [arm["predicted"] for arm in arms.values()]
        drifts += [drift for arm in arms.values() for drift in arm.get("predicted_over", {}).values()]
        names = size_names(definition)
        good = _is_base(base, names)
        good = good and all(map(_is_request, asked)) and all(name == printable(name, 100) for name in names)
        good = good and all(len(place_in(size)) == len(names) for one in asked for size in one["sizes"])
        good = good and all(drift is None or math.isfinite(drift) for drift in drifts)
        good = good and all(name == printable(name, 100) for name in arms)
        good = good and all(map(_is_place, definition.get("failed", [])))
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError, ConfigError):
        good = False
    if not good:
        raise ConfigError(f"{printable(path)} is missing or damaged; give the folder of a sweep")
    return definition


def _is_base(base: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Whether this is what the runs of a sweep over the sizes `names` have in common."""
    if base.get("trainer"):
        return isinstance(base["trainer"], str) and isinstance(base["hyperparameter"], str)
    whole = {*missing_settings(base)} <= varied_settings(names, base.get("held_tokens"))
    return whole and isinstance(base["base_width"], int) and can_be_swept(base["hyperparameter"])


def _of_this_edition(definition: dict[str, Any]) -> dict[str, Any]:
    """The content of a sweep.json with today's names. The first edition knew one size axis."""
    base = dict(definition["base"])
    if "knob" in base:
        base |= {"size": "width", "hyperparameter": base.pop("knob")}
    former = {"widths": "sizes", "octaves": "log2_factors"}
    asked = [{former.get(name, name): value for name, value in one.items()} for one in definition["asked"]]
    return definition | {"base": base, "asked": asked}


def _is_request(asked: Mapping[str, Any]) -> bool:
    """Whether this is an entry of "asked" in a sweep.json, of a size that makes sense."""
    axes = [asked[name] for name in ("sizes", "seeds", "log2_factors", "arms")]
    numbers = [*itertools.chain(*map(place_in, asked["sizes"])), *asked["seeds"], *asked["log2_factors"]]
    sane = all(isinstance(number, (int, float)) and abs(number) < 2**63 for number in numbers)
    return sane and math.prod(map(len, axes)) <= MOST_RUNS and all(isinstance(arm, str) for arm in asked["arms"])


def _is_place(entry: Sequence[Any]) -> bool:
    """Whether this is an entry of "failed" in a sweep.json: arm, size, log2 factor, seed."""
    arm, size, log2_factor, seed = entry
    whole = all(type(number) is int for number in (*place_in(size), seed))
    return isinstance(arm, str) and whole and math.isfinite(log2_factor)


def read_results(out: Path) -> list[RunResult]:
    """All finished runs of a folder, by arm, size, factor and seed. Raises ConfigError for a damaged one."""
    results = []
    for path in out.glob(f"{RUNS}/*/{RESULT}"):
        try:
            result = RunResult.from_json(read_bytes(path), path)
        except OSError as fault:
            raise ConfigError(f"{printable(path)} cannot be read ({fault.strerror}); delete it") from None
        if result.id != path.parent.name:
            raise ConfigError(f"{printable(path)} is the result of another run, {printable(result.id, 20)}; delete it")
        results.append(result)
    return sorted(results, key=place_of)


RESULTS = ("seed", "loss", "diverged", "train_loss", "seconds", "flops", *MADE_WITH)  # columns after the axes


def write_csv(out: Path, path: Path) -> None:
    """The finished runs as a table that `transfer.read_points` reads; losses are nan where a run diverged.

    The factor on the hyperparameter is in the column lr, or, if that is no learning rate, in one that `axes_of` names.
    """
    definition = read_definition(out)
    axes, names = axes_of(definition), size_names(definition)
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    columns = [name for name in RESULTS if name != "train_loss" or not trainer_of(definition)]
    writer.writerow(["arm", *names, axes.short, f"log2_{axes.short}", *columns])
    for result in read_results(out):
        at = result.value, result.log2_factor + math.log2(result.unit)
        cells: dict[str, Any] = {
            "seed": result.seed,
            "loss": math.nan if result.diverged else result.loss,
            "diverged": int(result.diverged),
            "train_loss": result.train_loss,
            "seconds": round(result.seconds, 3),
            "flops": f"{result.flops:.6g}",
        } | {name: result.made_with.get(name, "") for name in MADE_WITH}
        writer.writerow([result.arm, *result.place, *at, *(cells[name] for name in columns)])
    write_whole(path, file.getvalue())


def _entry(place: Place) -> int | list[int]:
    """A place as sweep.json has it: of one axis its value alone, as the first edition wrote it."""
    return place[0] if len(place) == 1 else list(place)


def place_in(entry: Any) -> Place:
    """The place in an entry of a sweep.json."""
    return tuple(entry) if isinstance(entry, list) else (entry,)


def size_names(definition: Mapping[str, Any]) -> tuple[str, ...]:
    """The size axes of a sweep, in the order of its places."""
    return tuple(definition["base"].get("sizes") or [definition["base"]["size"]])


def axes_of(definition: Mapping[str, Any]) -> Axes:
    """The axes of a sweep, its first size; a factor on learning rates goes by their setting's name, on another by
    NAME_factor."""
    axes = Axes(definition["base"]["size"], definition["base"]["hyperparameter"])
    if trainer_of(definition):
        return axes
    return axes if axes.is_rate else Axes(axes.size, f"{axes.hyperparameter}_factor")


def trainer_of(definition: Mapping[str, Any]) -> str:
    """What trained the runs of a sweep; nothing for this package's model, where the hyperparameter is a factor."""
    return definition["base"].get("trainer", "")


def tuned_flag(definition: Mapping[str, Any], arm: str) -> tuple[str, float]:
    """The flag for what the sweep tuned, and its value where the factor is 1: ("--lr-scale", 1.0).

    Of a hyperparameter that is several settings it is their common factor.
    """
    name = definition["base"]["hyperparameter"]
    if trainer_of(definition):
        return name, 1.0
    if name not in swept_settings():
        return f"factor on {name}", 1.0
    return f"--{name.replace('_', '-')}", (definition["base"] | definition["arms"][whole_arm(arm)]["settings"])[name]
