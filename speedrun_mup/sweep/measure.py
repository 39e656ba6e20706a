"""A sweep folder as the estimator takes it: runs, training curves, and doubts about them."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import printable
from speedrun_mup.sweep.arms import is_variant
from speedrun_mup.sweep.folder import axes_of, place_in, read_definition, read_results, size_names, trainer_of
from speedrun_mup.sweep.grid import propose_points
from speedrun_mup.sweep.result import Place, RunResult, mean_losses, place_of
from speedrun_mup.transfer import (
    MADE_WITH,
    Array,
    Axes,
    CurveKey,
    Doubt,
    Point,
    SurfaceResult,
    TransferResult,
    differing,
    measure_surface,
    measure_transfer,
    missing,
)
from speedrun_mup.transfer.axes import told_sizes
from speedrun_mup.transfer.points import along, slice_name

FEWEST_STEPS = 3  # that curves must share to be compared


def points_of(results: Iterable[RunResult]) -> list[Point]:
    """Finished runs as the estimator takes them: the loss is nan if a run diverged."""
    return [_point(result) for result in results]


def _point(result: RunResult) -> Point:
    loss = math.nan if result.diverged else result.loss
    return Point(result.sizes, result.value, result.seed, loss, result.arm)


def made_differently(results: Sequence[RunResult], axes: Axes) -> list[Doubt]:
    """Doubts about results that several versions of the code, of torch, several devices or types of numbers made."""
    pairs = [(result, _point(result)) for result in results]
    return [
        doubt
        for name in MADE_WITH
        for doubt in differing(name, ((result.made_with.get(name, ""), point) for result, point in pairs), axes)
    ]


def not_run(out: Path, results: Sequence[RunResult], arms: Collection[str]) -> tuple[list[Doubt], list[str]]:
    """Doubts about runs of `arms` that were asked for in a folder and have no result; and what its grids still grow by."""
    curves: dict[tuple[str, Place], dict[float, float]] = defaultdict(dict)
    for (arm, place, at), loss in mean_losses(results).items():
        curves[arm, place][at] = loss
    requests: dict[tuple[str, Place], list[dict[str, Any]]] = defaultdict(list)
    definition = read_definition(out)
    for asked in definition["asked"]:
        for arm, size in itertools.product(asked["arms"], asked["sizes"]):
            requests[arm, place_in(size)].append(asked)
    axes, have = size_names(definition), {place_of(result) for result in results}
    wanted: dict[str, set[tuple[Place, float, int]]] = {arm: set() for arm in arms}
    for (arm, place), some in requests.items():
        if arm in wanted:
            wanted[arm] |= {(place, at, seed) for at, seed in _points_asked(some, curves[arm, place])}
    for arm, size, at, seed in definition.get("failed", []):
        if arm in wanted:
            wanted[arm].add((place_in(size), at, seed))
    absent = {arm: [point for point in sorted(points) if (arm, *point) not in have] for arm, points in wanted.items()}
    names = {
        arm: [f"{told_sizes(dict(zip(axes, place)))} 2^{at:g} seed {seed}" for place, at, seed in points]
        for arm, points in absent.items()
    }
    growing = sum(_grows(some, curves[key]) for key, some in requests.items() if key[0] in wanted)
    notes = [f"the grid still grows by {growing} points: run the same sweep again"] if growing else []
    return [*missing(names, {arm: len(places) for arm, places in wanted.items()})], notes


def _points_asked(requests: Sequence[Mapping[str, Any]], curve: Mapping[float, float]) -> set[tuple[float, int]]:
    """(log2 factor, seed) of all runs that `requests` want at one size of one arm. curve: factor -> mean loss, so far.

    Points outside all grids come from growing them, and want all seeds.
    """
    grids = [set(map(float, asked["log2_factors"])) for asked in requests]
    grown = set(curve) - set().union(*grids)
    points: set[tuple[float, int]] = set()
    for asked, grid in zip(requests, grids):
        if asked.get("adaptive"):
            grid = grid | grown
        points |= set(itertools.product(grid, asked["seeds"]))
    return points


def _grows(requests: Sequence[Mapping[str, Any]], curve: Mapping[float, float]) -> int:
    """How many points an adaptive grid still asks for; unknown for several requests, which saw other curves."""
    asked = requests[0]
    if len(requests) > 1 or not asked.get("adaptive") or not set(map(float, asked["log2_factors"])) <= set(curve):
        return 0
    return len(propose_points(curve, asked["log2_factors"], asked.get("refine", True)))


def read_along(out: Path, size: str) -> list[RunResult]:
    """The results of a folder along one of its axes; arms are called as `along` calls them."""
    return [
        replace(
            result,
            arm=slice_name(result.arm, {name: value for name, value in result.sizes.items() if name != size}),
            sizes={size: result.sizes[size]},
        )
        for result in read_results(out)
    ]


def read_curves(out: Path, size: str | None = None) -> dict[CurveKey, Array]:
    """(arm, size, value, seed) -> (steps, 2) step and training loss; nan from where a diverged run ended.

    size: one of several axes, where arms are called as `along` calls them.
    """
    curves = {}
    for result in read_along(out, size or size_names(read_definition(out))[0]):
        if result.steps is not None:
            curve = np.array([result.steps, result.curve], dtype=float).reshape(2, -1).T
        else:
            losses = np.full(result.config["iterations"], np.nan)
            losses[: len(result.curve)] = result.curve
            curve = np.stack([np.arange(len(losses), dtype=float), losses], axis=1)
        curves[result.arm, result.size, result.value, result.seed] = curve
    return curves


def measure_sweep(
    out: Path, arms: Collection[str] | None = None, size: str | None = None, **options: Any
) -> TransferResult:
    """`measure_transfer` on a sweep folder, with its controls, base size and training curves.

    Args:
        out: The folder.
        arms: Those to look at (default: all). An arm without a predicted drift is under test, and the verdict is over all of
            these. A prediction of `ARMS` is about learning rates over width: on other axes that arm is neither tested nor a
            control. A variant of another arm (`is_variant`) is a control where its rates go another way, else beside.
        size: Of a sweep over several axes the one to measure along, by default its first: each place of the others is an arm
            of its own.
        options: For `measure_transfer`.

    Raises:
        ConfigError: For a folder without a sweep, or without such an arm or size.
        TransferError: See `measure_transfer`.
    """
    definition = read_definition(out)
    known, results = _runs_of(out, definition, arms)
    axes, names = axes_of(definition), size_names(definition)
    axes = replace(axes, size=size or axes.size)
    if axes.size not in names:
        raise ConfigError(f"--size {axes.size}: {out} is a sweep over {', '.join(names)}; name one of these")
    judged = [name for name in known if definition["arms"][name]["predicted"] is None] or known
    if not any(result.arm in judged for result in results):
        raise ConfigError(
            f"{printable(out)}: no run of {', '.join(judged)} is finished; run the sweep's own command again to resume it"
        )
    absent, notes = not_run(out, results, known)
    doubts = [*made_differently(results, axes), *absent]
    points, whose = points_of(results), {name: name for name in known}
    if len(names) > 1:
        points, whose = _slices(points, axes.size, names)
        doubts = [replace(doubt, arm=None) for doubt in doubts]
    several = [name for name in whose if len({point.sizes[axes.size] for point in points if point.arm == name}) > 1]
    curves = {key: curve for key, curve in read_curves(out, axes.size).items() if key[0] in several}
    entries = {name: definition["arms"][arm] for name, arm in whose.items()}
    over = {name: entry.get("predicted_over", {}).get(axes.size) for name, entry in entries.items()}
    of_width = {name: entry["predicted"] for name, entry in entries.items()}
    foreign = bool(trainer_of(definition))
    variants = {name for name, arm in whose.items() if is_variant(arm, definition["arms"]) and not foreign}
    predicted = over if axes.is_rate or foreign else {}
    if axes.is_rate and axes.size == "width":
        predicted = {name: of_width[name] or over[name] for name in whose}
    if not foreign and (variants or not axes.is_rate or axes.size != "width"):
        tested = [name for name in whose if of_width[name] is None and name not in variants] or list(whose)
        options["tested"] = options.get("tested") or tested
    base = definition["base"].get(axes.scale.base_setting)
    everywhere = all(any(point.sizes[axes.size] == base for point in points if point.arm == name) for name in whose)
    curves = curves if axes.scale.of_model and (not foreign or _share_steps(curves)) else {}
    about = {"axes": axes, "doubts": doubts, "notes": notes, "curves": curves}
    options = {"base_size": base if everywhere else None, **about} | options
    return measure_transfer(points, controls={k: v for k, v in predicted.items() if v is not None}, **options)


def _share_steps(curves: Mapping[CurveKey, Array]) -> bool:
    """Whether curves can be compared, as those of a program that prints its loss once cannot."""
    steps = [set(curve[:, 0]) for curve in curves.values()]
    return bool(steps) and len(set.intersection(*steps)) >= FEWEST_STEPS


def _slices(points: Sequence[Point], size: str, names: Sequence[str]) -> tuple[list[Point], dict[str, str]]:
    """Runs along one axis of several, and the arm of each slice; without slices that have a single size."""
    whose: dict[str, str] = {}
    sizes: dict[str, set[int]] = defaultdict(set)
    sliced = along(points, size, names)
    for point, part in zip(points, sliced, strict=True):
        whose[part.arm] = point.arm
        sizes[part.arm].add(part.sizes[size])
    kept = {arm: whose[arm] for arm in sorted(whose) if len(sizes[arm]) > 1}
    if not kept:
        raise ConfigError(
            f"--size {size}: no two runs differ in {size} and are alike in {', '.join(n for n in names if n != size)}; "
            "leave --size out to fit all axes at once"
        )
    return [part for part in sliced if part.arm in kept], kept


def measure_sweep_surface(out: Path, arms: Collection[str] | None = None, **options: Any) -> SurfaceResult:
    """`measure_surface` on the folder of a sweep over several sizes. Raises ConfigError, TransferError.

    arms: those to look at; default: all, of which those without a predicted drift are under test. options: for
    `measure_surface`.
    """
    definition = read_definition(out)
    known, results = _runs_of(out, definition, arms)
    names, axes = size_names(definition), axes_of(definition)
    predicted = {name: definition["arms"][name]["predicted"] for name in known}
    controls = {name: {"width": drift} for name, drift in predicted.items() if drift is not None}
    if trainer_of(definition):
        controls = {name: drifts for name in known if (drifts := definition["arms"][name].get("predicted_over"))}
    elif not axes.is_rate or "width" not in names:
        options["tested"] = options.get("tested") or [name for name in known if name not in controls] or known
        controls = {}
    absent, notes = not_run(out, results, known)
    about: dict[str, Any] = {
        "doubts": [*made_differently(results, axes), *absent],
        "notes": notes,
        "controls": controls,
    }
    return measure_surface(points_of(results), names, hyperparameter=axes.hyperparameter, **about | options)


def _runs_of(
    out: Path, definition: Mapping[str, Any], arms: Collection[str] | None
) -> tuple[list[str], list[RunResult]]:
    """The arms of a folder that are looked at, by default all, and their runs. ConfigError for one that it does not have."""
    known = [name for name in definition["arms"] if arms is None or name in arms]
    if unknown := set(arms or ()) - set(known):
        raise ConfigError(f"{out} has no arm {', '.join(sorted(unknown))}; it has {', '.join(definition['arms'])}")
    return known, [result for result in read_results(out) if result.arm in known]
