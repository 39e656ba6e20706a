"""Runs that differ in several sizes at once: their places, and whether these can tell the sizes apart."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speedrun_mup.files import printable
from speedrun_mup.transfer.axes import Axes, size_axis, told_sizes
from speedrun_mup.transfer.points import Point, TransferError

Place = tuple[int, ...]  # a value for each size axis
TELLING = 0.25  # doublings: what an axis must vary by itself, standard deviation, or its exponent is anyone's guess
MOST_PLACES = 300


@dataclass(frozen=True)
class Places(Axes):
    """Axes on which a size is the number of a place: one of `places`, which has a value for each of `names`.

    Where there is one name, a size is what it is elsewhere, its value.
    """

    names: tuple[str, ...] = ()
    places: tuple[Place, ...] = ()

    @property
    def plural(self) -> str:
        """Several of them, for a reader."""
        return "places"

    def at(self, size: int) -> str:
        """One of them: "width 64, n_layer 6"."""
        place = (size,) if len(self.names) == 1 else self.places[size]
        return told_sizes(dict(zip(self.names, place, strict=True)))


def by_place(
    points: Iterable[Point], names: Sequence[str], hyperparameter: str
) -> tuple[Places, dict[int, list[Point]]]:
    """Where the runs of one arm lie on the axes `names`, ascending; and the runs of each place, by what `Places` calls a size.

    Raises TransferError for no runs, for one without a size, for one that is there twice.
    """
    placed: dict[Place, list[Point]] = defaultdict(list)
    seen = set()
    for point in points:
        for name in names:
            if name not in point.sizes:
                have = ", ".join(map(printable, point.sizes)) or "none"
                raise TransferError(
                    f"a run without a size {printable(name, 60)}; it has {have}: name sizes that all have"
                )
        place = tuple(point.sizes[name] for name in names)
        key = place, point.log2_value, point.seed
        if key in seen:
            where = told_sizes(dict(zip(names, place, strict=True)))
            same = f"two runs of {where}, {hyperparameter} {point.value:g}, seed {point.seed}"
            raise TransferError(f"{same}; drop one, or name the size that they differ in")
        seen.add(key)
        placed[place].append(point)
    if not placed:
        raise TransferError("no runs: give one Point per finished run")
    if len(placed) > MOST_PLACES:
        raise TransferError(f"{len(placed)} places; at most {MOST_PLACES} are measured at a time: split the table")
    order = tuple(sorted(placed))
    axes = Places(names[0] if len(names) == 1 else "place", hyperparameter, tuple(names), order)
    return axes, {place[0] if len(names) == 1 else number: placed[place] for number, place in enumerate(order)}


def refuse_undecidable(names: Sequence[str], places: Sequence[Place]) -> None:
    """Raises TransferError where `places` cannot tell the sizes apart: one value on an axis, or sizes that go together."""
    if not places:
        raise TransferError("no runs have a best value: extend their grids, or add seeds")
    for name, values in zip(names, zip(*places, strict=True), strict=True):
        if len(set(values)) < 2:
            more = f"add runs with another {name}, such as {2 * values[0]}, or leave {name} out of the sizes"
            raise TransferError(f"{name} has one value in these runs ({values[0]}): {more}")
    for text in _confounded(names, places):
        raise TransferError(text)


def _confounded(names: Sequence[str], places: Sequence[Place]) -> Iterator[str]:
    """A line for the first axis that hardly varies while the others stand still, with a run that would change that."""
    at = np.log2(np.array(places, dtype=float))
    centred = at - at.mean(axis=0)
    for number, name in enumerate(names):
        others = np.delete(centred, number, axis=1)
        slopes = np.linalg.lstsq(others, centred[:, number], rcond=None)[0] if others.size else np.zeros(0)
        own = float((centred[:, number] - others @ slopes).std()) if others.size else float(centred[:, number].std())
        if own >= min(TELLING, 0.5 * float(centred[:, number].std())):
            continue
        rivals = [other for other in range(len(names)) if other != number]
        together = [names[other] for other, slope in zip(rivals, slopes, strict=True) if abs(slope) > 0.05]
        apart = _apart(names, places, number)
        yield (
            f"{name} goes together with {' and '.join(together or [names[rivals[0]]])} in these runs, so that their effects "
            f"cannot be separated: add runs with {apart}, or leave {name} out of the sizes"
        )


def _apart(names: Sequence[str], places: Sequence[Place], number: int) -> str:
    """A place that tells an axis from the others: its largest value, everything else at its smallest."""
    smallest = [min(values) for values in zip(*places, strict=True)]
    smallest[number] = max(place[number] for place in places)
    return told_sizes(dict(zip(names, smallest, strict=True)))


def base_of(names: Sequence[str], places: Sequence[Place], given: Mapping[str, int] | None) -> dict[str, int]:
    """The place that exponents count from: what is given, else the smallest value on every axis. TransferError for a name
    that is no axis, and for what is no size."""
    base = {name: min(values) for name, values in zip(names, zip(*places, strict=True), strict=True)}
    for name, value in (given or {}).items():
        if name not in base:
            raise TransferError(f"base {printable(name, 60)}={value}: no such size; there are {', '.join(base)}")
        check_size(name, value, "base")
        base[name] = value
    return base


def check_size(name: str, value: float, what: str) -> None:
    """Raises TransferError for what is no size of anything."""
    if not 1 <= value <= size_axis(name).most or value != int(value):
        raise TransferError(f"{what} {name} {value:.20g}: give a whole number from 1 to {size_axis(name).most:,}")


def outside(names: Sequence[str], places: Sequence[Place], target: Mapping[str, int]) -> dict[str, float]:
    """For each axis how far `target` lies beyond the places, in doublings: above zero past the largest, below zero under
    the smallest, 0 between."""
    found = {}
    for name, values in zip(names, zip(*places, strict=True), strict=True):
        beyond, below = math.log2(target[name] / max(values)), math.log2(target[name] / min(values))
        found[name] = max(beyond, 0.0) + min(below, 0.0)
    return found
