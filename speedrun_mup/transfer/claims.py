"""Are the runs what they claim to be? Copies that pass for sizes or seeds are refused, other doubts make INCONCLUSIVE.

A verdict compares runs that should differ in one thing and share all others. A script that ignores the size, a seed that does
not reach the runs, a sweep that is half done or that two versions of the code made give numbers all the same. This is the
one place that asks, for tables and for sweep folders.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from speedrun_mup.files import printable
from speedrun_mup.transfer.axes import SIZES, Axes
from speedrun_mup.transfer.fits import Array, LossTable, fit_quadratics
from speedrun_mup.transfer.points import Point, TransferError
from speedrun_mup.transfer.thresholds import Thresholds

MADE_WITH = ("source_sha256", "torch", "device", "dtype")  # what must be the same in all runs, arms and all
NAMED = 3  # examples in a sentence

# Noise between runs that differ only in chance is far above both of these, of what the loss is and of what the hyperparameter
# changes near the optimum: by 15 to 300 times in the published tables.
OF_LOSS, OF_RANGE = 5e-5, 2e-3
LEAST_CHANCE = math.log(1e-5)  # that honest runs look like copies
FURTHER_APART = 20.0  # times the noise: what the losses of two sizes lie apart at the least
MOST_PAIRS = 40  # beyond so many sizes or seeds, only neighbours are compared


@dataclass(frozen=True)
class Doubt:
    """A reason not to trust the numbers. kind: what to name to accept it; arm: None if it is about all."""

    kind: str
    text: str
    arm: str | None = None


def open_doubts(doubts: Sequence[Doubt], accept: Collection[str]) -> list[Doubt]:
    """The doubts that were not accepted. Raises TransferError for an accepted kind that no doubt has."""
    kinds = {doubt.kind for doubt in doubts}
    if unknown := sorted(set(accept) - kinds):
        have = f"there is {', '.join(sorted(kinds))}" if kinds else "there is nothing to accept"
        raise TransferError(f"--accept {printable(unknown[0], 60)}: no such doubt about these runs; {have}")
    return [doubt for doubt in doubts if doubt.kind not in accept]


# ---------------------------------------------------------------------------------------------------------------------
# What the runs claim
# ---------------------------------------------------------------------------------------------------------------------


def values_doubt(kind: str, runs: Mapping[str, Sequence[Point]], axes: Axes, arm: str | None = None) -> Doubt:
    """The doubt about runs, of one arm or of all, that differ in `kind`. runs: value of it -> the runs that have it."""
    told = []
    for value, some in sorted(runs.items(), key=lambda item: -len(item[1])):
        sizes = ", ".join(map(str, sorted({run.sizes[axes.size] for run in some})[:8]))
        arms = ", ".join(sorted({printable(run.arm, 40) for run in some})[:NAMED])
        told.append(f"{printable(value, 24)} ({len(some)} of {arms} at {axes.size} {sizes})")
    shown = "; ".join(told[: NAMED + 1]) + (" and more" if len(told) > NAMED + 1 else "")
    made = f"{len(runs)} different {kind} made these runs"
    differ = made if kind in MADE_WITH else f"{kind} has {len(runs)} values in these runs"
    both = f", measure both: --size {axes.size} {kind}," if kind in SIZES and kind not in axes.scale.follow else ""
    return Doubt(kind, f"{differ}: {shown}; run them alike,{both} or --accept {kind}", arm)


def differing(kind: str, values: Iterable[tuple[str, Point]], axes: Axes) -> Iterator[Doubt]:
    """A doubt if the runs differ in `kind`; a run without a value says nothing."""
    runs = defaultdict(list)
    for value, run in values:
        if value:
            runs[value].append(run)
    if len(runs) > 1:
        yield values_doubt(kind, runs, axes)


def missing(names: Mapping[str, Sequence[str]], asked: Mapping[str, int]) -> Iterator[Doubt]:
    """A doubt for every arm that lacks runs that were asked for. names: arm -> its missing runs; asked: arm -> how many."""
    for arm, absent in names.items():
        if absent:
            more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
            shown = ", ".join(map(printable, absent[:NAMED])) + more
            count = f"{len(absent)} of the {asked[arm]} runs asked for are missing or failed"
            yield Doubt("missing", f"{count}: {shown}; run the same sweep again, or --accept missing", arm)


# ---------------------------------------------------------------------------------------------------------------------
# Copies
# ---------------------------------------------------------------------------------------------------------------------


def refuse_copies(tables: Mapping[str, Sequence[LossTable]], noise_known: bool, thresholds: Thresholds) -> None:
    """Raises TransferError where the runs of several sizes or seeds of an arm are the same, up to rounding or an offset.

    noise_known: else only sizes that are equal without an offset are refused; no verdict can follow then anyway.
    """
    found = []
    for arm, some in tables.items():
        scales = _scales(some, thresholds)
        seeds = [*_copied_seeds(scales)]
        if seeds and all(len(table.losses) < 2 or table.place in dict(seeds) for table in some):
            found.append((arm, "all seeds have the same losses, up to an offset", "seed"))
        else:
            found += [
                (arm, f"{place}: seeds {pair} have the same losses, up to an offset", "seed") for place, pair in seeds
            ]
        if sizes := _copied_sizes(scales, noise_known):
            names, axes = ", ".join(map(str, sizes)), some[0].axes
            found.append((arm, f"{axes.plural} {names} have the same losses, up to an offset", axes.size))
    if found:
        arm, text, what = found[0]
        where = f"arm {printable(arm, 60)}: " if len(tables) > 1 else ""
        more = f" (and {len(found) - 1} more of the kind)" if len(found) > 1 else ""
        raise TransferError(f"{where}{text}; see if the {what} reaches the runs, or give more digits{more}")


def _step(tables: Sequence[LossTable]) -> float:
    """The precision of the losses: 0.001 if none has more than three decimals; next to nothing if they have all digits."""
    losses = np.concatenate([table.losses[np.isfinite(table.losses)] for table in tables] or [np.zeros(0)])
    largest = float(np.abs(losses).max(initial=0.0))
    for digits in range(12):
        if (np.abs(np.round(losses, digits) - losses) <= 1e-14 * largest).all():
            return max(10.0**-digits, 1e-12 * largest)
    return 1e-12 * largest


def _copied_seeds(scales: Sequence[_Scale]) -> Iterator[tuple[str, str]]:
    """(place, names of seeds) where seeds are copies: two of one size, all of it, two over all sizes, or everything."""
    groups: dict[str, list[tuple[str, _Evidence]]] = defaultdict(list)
    for scale in scales:
        table = scale.table
        share = 2 / max(len(table.losses), 2)  # pairs that share a seed are not independent: S - 1 of them are
        for one, other in _pairs(len(table.losses)):
            found = scale.compare(table.losses[one], table.losses[other], table.log2_value)
            pair = f"{table.seeds[one]} and {table.seeds[other]}"
            groups[pair].append((table.place, found))
            groups[f"{pair} of {table.size}"].append((table.place, found))
            groups[f"of {table.size}"].append((table.place, found.counted(share)))
            groups["of all"].append((table.place, found.counted(share)))
    told: dict[str, str] = {}
    for name, some in groups.items():
        if _together(found for _, found in some).copied:
            told |= {place: name.partition(" of ")[0] for place, _ in some if place not in told}
    yield from told.items()


def _copied_sizes(scales: Sequence[_Scale], noise_known: bool) -> list[int]:
    """Sizes whose curves are those of another size, seed by seed in whatever order."""
    copied: set[int] = set()
    chain = []
    for one, other in _pairs(len(scales)):
        together = _matched(scales[one], scales[other].table)
        if other == one + 1:
            chain.append(together)
        if together.equal or (noise_known and together.copied):
            copied |= {scales[one].table.size, scales[other].table.size}
    whole = _together(chain)
    if whole.equal or (noise_known and whole.copied):
        copied |= {scale.table.size for scale in scales}
    return sorted(copied)


def _matched(scale: _Scale, other: LossTable) -> _Evidence:
    """Evidence that every curve of `other` is a copy of some curve of the scale's size, whatever its seed is called."""
    mine, found = scale.table, []
    grid = np.intersect1d(mine.log2_value, other.log2_value)
    if not len(grid):  # values of their own at every size
        return _Evidence()
    theirs = mine.losses[:, np.isin(mine.log2_value, grid)]
    for seed in other.losses[:, np.isin(other.log2_value, grid)]:
        best = scale.compare(seed, theirs[_closest(seed, theirs)], grid, FURTHER_APART)
        found.append(best.penalised(math.log(len(theirs))))
    return _together(found)


def _closest(curve: Array, others: Array) -> int:
    """Which of the rows of `others` has the shape of `curve`, among those that share most points with it."""
    gaps = curve - others
    seen = np.isfinite(gaps)
    shared = seen.sum(axis=1)
    spread = np.where(seen, gaps, -np.inf).max(axis=1) - np.where(seen, gaps, np.inf).min(axis=1)
    return int(np.where(shared == shared.max(), spread, np.inf).argmin())


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    """All pairs of 0 to count - 1; of many only neighbours."""
    return itertools.combinations(range(count), 2) if count <= MOST_PAIRS else itertools.pairwise(range(count))


@dataclass(frozen=True)
class _Evidence:
    """That two curves are copies, as logarithms of the chance that honest ones look like it.

    exact: that they are equal to the last digit; same: up to an offset. squares, freedom: sum of squares of their
    differences about an offset, and its degrees of freedom. least, usual: standard deviations, below which no honest
    noise is, and what it has at the least as far as this arm shows. chances: of a best of several.
    """

    exact: float = 0.0
    same: float = 0.0
    squares: float = 0.0
    freedom: float = 0.0
    least: float = 0.0
    usual: float = 0.0
    chances: float = 0.0

    @property
    def jitter(self) -> float:
        """That the differences are so small by chance: the lower tail of the chi-squared distribution, by its first term."""
        if self.freedom == 0 or self.squares > self.freedom * self.least**2:
            return 0.0
        half = self.freedom / 2
        tail = half * math.log(max(self.squares, 1e-300) / self.usual**2 / 2) - math.lgamma(half + 1)
        return min(tail + self.chances, 0.0)

    @property
    def equal(self) -> bool:
        """Whether they are copies to the last digit."""
        return self.exact <= LEAST_CHANCE

    @property
    def copied(self) -> bool:
        """Whether they are copies, up to an offset and rounding."""
        return min(self.exact, self.same, self.jitter) <= LEAST_CHANCE

    def counted(self, share: float) -> _Evidence:
        """The same, counted as so much of a comparison."""
        return replace(
            self,
            exact=share * self.exact,
            same=share * self.same,
            squares=share * self.squares,
            freedom=share * self.freedom,
        )

    def penalised(self, chances: float) -> _Evidence:
        """The same, found as the best of exp(chances) comparisons."""
        exact, same = min(self.exact + chances, 0.0), min(self.same + chances, 0.0)
        return replace(self, exact=exact, same=same, chances=self.chances + chances)


def _together(evidence: Iterable[_Evidence]) -> _Evidence:
    """Several comparisons as one, in which all must be copies: one that plainly is none leaves nothing of the others."""
    some = [each for each in evidence if each.freedom or each.exact or each.same]
    if not some:
        return _Evidence()
    freedom = sum(each.freedom for each in some) or 1.0
    small = all(each.squares <= each.freedom * (2 * each.least) ** 2 for each in some)
    return _Evidence(
        exact=sum(each.exact for each in some) if all(each.exact for each in some) else 0.0,
        same=sum(each.same for each in some) if all(each.same for each in some) else 0.0,
        squares=sum(each.squares for each in some) if small else math.inf,
        freedom=freedom,
        least=sum(each.freedom * each.least for each in some) / freedom,
        usual=sum(each.freedom * each.usual for each in some) / freedom,
        chances=sum(each.chances for each in some),
    )


@dataclass(frozen=True)
class _Scale:
    """Of one size's losses: left, right: where its optimum is. step: their precision. least, usual: as in
    `_Evidence`."""

    table: LossTable
    left: float
    right: float
    step: float
    least: float
    usual: float

    def compare(self, one: Array, other: Array, grid: Array, further: float = 1.0) -> _Evidence:
        """Evidence that the losses `one` and `other` (K,) over `grid` are copies. further: times `usual` that the losses
        themselves would lie apart, with their offset."""
        gap = one - other
        both = np.isfinite(gap)
        close = gap[both & (grid >= self.left) & (grid <= self.right)]
        gap = gap[both]
        if len(gap) < 2:
            return _Evidence()
        tie = self.step / (self.usual + 1e-300)
        exact = len(gap) * math.log(min(0.28 * tie / further, 1.0)) if np.abs(gap).max() < 0.6 * self.step else 0.0
        apart = np.abs(gap - np.median(gap)).max()
        within = 0.28 if apart < 0.1 * self.step else 0.56  # an offset of whole steps, or any
        same = (len(gap) - 1) * math.log(min(within * tie, 1.0)) if apart < 1.1 * self.step else 0.0
        freedom = len(close) - 1.0
        if freedom < 1:
            return _Evidence(exact, same)
        squares = float(((close - close.mean()) ** 2).sum()) / 2 + freedom * self.step**2 / 12
        least = max(self.least, 0.3 * self.step)
        return _Evidence(exact, same, squares, freedom, least, max(self.usual, 4 * least))


def _scales(tables: Sequence[LossTable], thresholds: Thresholds) -> list[_Scale]:
    """The scale of every size of an arm."""
    step, scales = _step(tables), []
    for table in tables:
        near_fit = fit_quadratics(
            table.log2_value, table.mean[None], 1.5 * thresholds.window, 4 * thresholds.window_excess
        )
        left, right = float(near_fit.left[0]), float(near_fit.right[0])
        near = table.mean[(table.log2_value >= left) & (table.log2_value <= right)]
        lowest = float(near.min())
        least = min(OF_RANGE * (float(near.max()) - lowest), OF_LOSS * abs(lowest))
        least = max(least, 1e-7 * abs(lowest))
        scales.append(_Scale(table, left, right, step, least, 5 * least))
    pairs = [
        math.sqrt(found.squares / found.freedom)
        for scale in scales
        for one, other in _pairs(len(scale.table.losses))
        if (found := scale.compare(scale.table.losses[one], scale.table.losses[other], scale.table.log2_value)).freedom
    ]
    seen = float(np.median(pairs)) if pairs else 0.0
    return [replace(scale, least=max(scale.least, seen / 10), usual=max(scale.usual, seen / 3)) for scale in scales]
