"""The coordinate check of any model: arms are observed at every width, judged, and compared with their controls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from speedrun_mup.coord_check.observe import ArmRecipe, CheckSetup, Findings, Loss, Record, observe
from speedrun_mup.coord_check.results import (
    NARROW,
    NORMS,
    THRESHOLDS,
    TIED,
    WIDTH,
    CheckedArm,
    CheckedAxis,
    ControlResult,
    CoordCheck,
    Place,
    Series,
    SlopeRow,
    SlopeThresholds,
)
from speedrun_mup.core.errors import UserError


class CoordCheckError(UserError):
    """A check that cannot be run as asked."""

    exit_code = 2


@dataclass(frozen=True)
class Control(ArmRecipe):
    """An arm with a rule wrong on purpose: updates of `role` (None: all) must be seen to go as width**slope times the rule's.

    Where an lr_power makes the difference, times whatever the checked arm's go as.
    """

    role: Place | None = None
    slope: float = 0.5


def coord_check(
    build_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    data: Iterable[Any],
    loss: Loss,
    optimizer: Callable[[nn.Module], Optimizer | Sequence[Optimizer]],
    *,
    controls: Sequence[Control] | None = None,
    steps: int = 6,
    seeds: int = 4,
    taps: Callable[[nn.Module, Record], None] = lambda model, record: None,
    output_scale: Callable[[nn.Module], Mapping[str, float]] = lambda model: {},
    thresholds: SlopeThresholds = THRESHOLDS,
    name: str = "model",
    progress: bool = True,
    axis: CheckedAxis = WIDTH,
) -> CoordCheck:
    """Check the scaling of any model in muP, in float32 on the CPU.

    Args:
        build_model: width -> a module whose parameters have roles (mup.declare or mup.set_base_shapes), initialised from
            torch's seed.
        widths: three or more, the widest at least four times the narrowest; or sizes along another axis.
        data: batches; steps + 1 of them are used per seed, the same at every width, from the start again when they run out.
        loss: (model, batch) -> a scalar.
        optimizer: model -> one optimizer or several; only their learning rates are ever changed.
        controls: arms that must fail; by default the same model with all learning rates times sqrt(width / narrowest).
        steps: updates, at least 4; more if layers that start at zero hide many others.
        seeds: models per width.
        taps: called once with (model, record), to arrange for record(name, tensor) in forward passes, for activations that
            no module puts out (scores of torch's attention are recorded without).
        output_scale: model -> what it multiplies the product of a parameter by, by the parameter's name, where it is not
            done by a module of its own on the way in, as MuReadout does.
        thresholds: what decides a verdict.
        name: of the model, in the results.
        progress: whether to show a progress bar.
        axis: what is scaled, WIDTH or DEPTH; `build_model` gets a size of it.

    Raises:
        CoordCheckError: for widths, steps, seeds or data that cannot give a verdict.
        UndeclaredParameterError: for a parameter without a role.
    """
    widths = sorted(set(widths))
    fits = thresholds.min_widths <= len(widths) and widths[-1] >= thresholds.min_span * widths[0]
    if not fits or steps < 1 or seeds < 1:
        several, largest, smallest = axis.words
        raise CoordCheckError(
            f"{several}={widths}, steps={steps}, seeds={seeds}: give at least {thresholds.min_widths} {several}, the {largest} "
            f"{thresholds.min_span:g} times the {smallest}, and at least one step and seed"
        )
    batches = list(itertools.islice(itertools.cycle(data), seeds * (steps + 1)))
    if not batches:
        raise CoordCheckError("data has no batch; give an iterable of what loss(model, batch) takes")
    per_seed = [batches[seed * (steps + 1) : (seed + 1) * (steps + 1)] for seed in range(seeds)]
    setup = CheckSetup(loss, per_seed, taps, output_scale, thresholds, axis)
    if controls is None:
        controls = [Control("lr-sqrt-m", build_model, optimizer, lr_power=0.5)]
    fewer = widths[:-1]  # enough for controls, if it is enough at all
    if len(fewer) < thresholds.min_widths or fewer[-1] < thresholds.min_span * fewer[0]:
        fewer = widths
    runs = len(widths) * seeds + len(fewer) * len(controls)
    with torch.random.fork_rng(devices=[]), tqdm(total=runs, disable=not progress or None, leave=False) as bar:
        checked = _measure(ArmRecipe(name, build_model, optimizer), widths, seeds, setup, bar)
        results = []
        for control in controls:
            arm = _measure(control, fewer, 1, setup, bar)
            slope = arm.update_slope(control.role) - (checked.update_slope(control.role) if control.lr_power else 0.0)
            seen = slope * math.copysign(1.0, control.slope) > thresholds.fail
            results.append(ControlResult(arm, control.role, slope, control.slope, seen))
    return CoordCheck(checked, tuple(results), steps, thresholds, axis.name)


def _measure(arm: ArmRecipe, widths: Sequence[int], seeds: int, setup: CheckSetup, progress: tqdm) -> CheckedArm:
    """Observe `arm` at all widths and with all seeds, and judge it."""
    found = []
    for seed, width in itertools.product(range(seeds), widths):
        progress.set_postfix_str(f"{arm.name}, {setup.axis.name} {width}")
        found.append(observe(arm, width, min(widths), seed, setup))
        progress.update()
    series: list[Series] = []
    by_seed: list[list[Series]] = [[] for _ in range(seeds)]
    roles = {name: role for findings in found for name, role in findings.roles.items()}
    for quantity, name in dict.fromkeys(key for findings in found for key in findings.values):
        taken = [findings.values.get((quantity, name), {}) for findings in found]
        values = np.array([[at.get(t, math.nan) for t in range(setup.steps + 1)] for at in taken])
        logs = np.log2(np.where(values == 0, math.nan, values)).reshape(seeds, len(widths), -1)
        role = roles.get(name)
        series.append(Series(quantity, name, role, np.exp2(logs.mean(axis=0))))
        for of_seed, own in zip(by_seed, np.exp2(logs)):
            of_seed.append(Series(quantity, name, role, own))
    rows = tuple(judge(series, widths, setup.thresholds, setup.axis, _narrow(found, setup.thresholds.narrow)))
    rows = tuple(_with_errors(rows, [judge(own, widths, setup.thresholds, setup.axis) for own in by_seed]))
    problems = tuple(_problems(found, rows, setup))
    return CheckedArm(arm.name, tuple(widths), seeds, tuple(series), rows, problems)


def _narrow(found: Sequence[Findings], side: int) -> set[str]:
    """The kinds of matrices whose smaller side grows with width, from less than `side`."""
    sides: dict[str, set[int]] = {}
    for findings in found:
        for kind, smaller in findings.sides.items():
            sides.setdefault(kind, set()).add(smaller)
    return {kind for kind, seen in sides.items() if len(seen) > 1 and min(seen) < side}


def _with_errors(rows: Iterable[SlopeRow], by_seed: Sequence[Iterable[SlopeRow]]) -> Iterator[SlopeRow]:
    """The rows with the standard error of their slope, from the slopes of each seed alone."""
    slopes: dict[tuple[str, str, Place | None], list[float]] = {}
    for row in itertools.chain(*by_seed):
        slopes.setdefault((row.quantity, row.kind, row.role), []).append(row.slope)
    for row in rows:
        own = slopes.get((row.quantity, row.kind, row.role), [])
        usable = len(own) > 1 and np.isfinite(own).all()
        yield replace(row, error=float(np.std(own, ddof=1) / math.sqrt(len(own)))) if usable else row


def _problems(found: Sequence[Findings], rows: Iterable[SlopeRow], setup: CheckSetup) -> Iterator[str]:
    """Why the slopes of an arm prove nothing."""
    if setup.steps <= setup.thresholds.first_step:
        yield f"{setup.steps} updates are too few; take {setup.thresholds.first_step + 1} or more"
    still = set().union(*(findings.still for findings in found))
    unseen = set().union(*(findings.unseen for findings in found))
    if still:
        yield f"{', '.join(sorted(still))} did not move in {setup.steps} updates"
    if unseen:
        yield f"{', '.join(sorted(unseen))} cannot be followed: they multiply nothing that can be observed"


_ROWS = {"effect": ("init", "update"), "size": ("update",), "gradient": ("gradient",)}


def judge(
    series: Iterable[Series],
    widths: Sequence[int],
    thresholds: SlopeThresholds,
    axis: CheckedAxis = WIDTH,
    narrow: Collection[str] = (),
) -> Iterator[SlopeRow]:
    """The rows of an arm: the mean over tensors of one kind of every slope that is judged or shown.

    Args:
        series: what was measured.
        widths: the sizes.
        thresholds: what decides.
        axis: what is predicted.
        narrow: kinds of matrices with a side that is very small at the narrowest width.
    """
    late = slice(thresholds.first_step, None)
    kinds: dict[tuple[str, str, Place | None], list[Series]] = {}
    for one in series:
        kinds.setdefault((one.quantity, one.kind, one.role), []).append(one)
    for (quantity, kind, role), alike in kinds.items():
        names = _ROWS.get(quantity, (quantity,))
        if quantity == "effect" and ("size", kind, role) in kinds:  # the update is told by that
            names = ("init",)
        for row in names:
            times = slice(0, 1) if row == "init" else slice(-1, None) if row in NORMS else late
            slopes = [slope for one in alike if (slope := one.slope(widths, times)) is not None]
            if not slopes:
                continue
            starts_tied = row == "init" and kind.endswith(TIED)
            told = row != "gradient" or thresholds.gradients
            predicted = axis.predicted.get(row, {}).get(role) if told and not starts_tied else None
            slack = NARROW if row == "update" and kind in narrow else 0.0
            found = SlopeRow(row, kind, role, len(slopes), sum(slopes) / len(slopes), predicted, None, slack=slack)
            judged = predicted is not None or row == "activation" or starts_tied
            yield replace(found, verdict=thresholds.judge(found.deviation)) if judged else found
