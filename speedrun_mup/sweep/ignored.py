"""Does a program use what a sweep varies? One that ignores a rate, a size or a seed gives the same result at two of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from speedrun_mup.sweep.result import RunResult
from speedrun_mup.transfer.axes import told_sizes

DIGITS = 5  # of a loss that two different runs hardly share by chance
POINTS = 3  # of a curve, likewise


def ignored(results: Sequence[RunResult], hyperparameter: str) -> list[str]:
    """A sentence for each thing that is varied and that some runs show no trace of.

    Two runs that differ in it alone and are the same to the last digit show that: with losses of DIGITS digits or curves of
    several values at once, else where all runs that differ in it alone are the same, three or more.
    """
    finite = [result for result in results if not result.diverged]
    return [line for axis in _axes(finite, hyperparameter) if (line := _told(finite, axis))]


@dataclass(frozen=True)
class _Axis:
    """What is varied. of: its value in a run; others: what else tells runs apart."""

    name: str
    of: Callable[[RunResult], object]
    others: Callable[[RunResult], object]


def _axes(results: Sequence[RunResult], hyperparameter: str) -> Iterator[_Axis]:
    if not results:
        return
    yield _Axis(hyperparameter, lambda run: f"{run.value:.4g}", lambda run: (run.arm, run.place, run.seed))
    for name in results[0].sizes:
        yield _Axis(
            name,
            lambda run, name=name: run.sizes[name],  # type: ignore[misc]
            lambda run, name=name: (run.arm, _without(run, name), run.log2_factor, run.seed),  # type: ignore[misc]
        )
    yield _Axis("seed", lambda run: run.seed, lambda run: (run.arm, run.place, run.log2_factor))


def _without(run: RunResult, name: str) -> tuple[int, ...]:
    return tuple(value for key, value in run.sizes.items() if key != name)


def _told(results: Sequence[RunResult], axis: _Axis) -> str:
    """The sentence about one axis; nothing where every run shows it."""
    groups: dict[object, list[RunResult]] = defaultdict(list)
    for run in results:
        groups[axis.others(run)].append(run)
    pairs = [pair for runs in groups.values() for pair in _alike(runs)]
    if not pairs:
        return ""
    one, other = pairs[0]
    at = "" if axis.name in one.sizes else f", {told_sizes(one.sizes)}"
    seed = "" if axis.name == "seed" else f", seed {one.seed}"
    more = f", and {len(pairs) - 1} more such pairs" if len(pairs) > 1 else ""
    same = f"the same loss {one.loss:.6g} at {axis.name} {axis.of(one)} and {axis.of(other)}"
    return f"{same} (arm {one.arm}{at}{seed}{more}): does the program use {{{axis.name}}}?"


def _alike(runs: Sequence[RunResult]) -> Iterator[tuple[RunResult, RunResult]]:
    """Pairs of runs that are copies, of runs that differ in one thing."""
    same: dict[object, list[RunResult]] = defaultdict(list)
    for run in runs:
        same[run.loss, tuple(run.curve)].append(run)
    for copies in same.values():
        if len(copies) > 1 and (_tells(copies[0]) or len(copies) == len(runs) > 2):
            yield from ((copies[0], copy) for copy in copies[1:])


def _tells(run: RunResult) -> bool:
    """Whether two different runs would hardly have this result by chance."""
    digits = len(repr(run.loss).partition("e")[0].replace(".", "").lstrip("-0"))
    return digits >= DIGITS or len({value for value in run.curve if math.isfinite(value)}) >= POINTS
