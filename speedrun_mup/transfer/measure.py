"""The measurement: optima, drift, regret and the equivalence test, from runs to verdict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from speedrun_mup.files import printable
from speedrun_mup.transfer.axes import ROUNDED, Axes, with_article
from speedrun_mup.transfer.claims import Doubt, open_doubts, refuse_copies, values_doubt
from speedrun_mup.transfer.drift import measure_arm
from speedrun_mup.transfer.fits import Array, LossTable, Noise, build_loss_table, fit_size
from speedrun_mup.transfer.points import CurveKey, Point, TransferError
from speedrun_mup.transfer.results import ArmResult, TransferResult
from speedrun_mup.transfer.thresholds import Thresholds, Verdict, worst

MOST_SIZES = 600  # curves of one size and one arm, of all arms together
# Of a table that does not say where its runs began: a loss that lies further above the lowest than this many times that, or
# than so many nats, whichever is more, was no model any more.
EXPLODED = 10.0
NO_GAIN = 0.01  # of the loss: less than four times the size gives in any sweep of ours
HUGE = 1e30  # a loss beyond this is no number, whatever the others are


def measure_transfer(
    points: Iterable[Point],
    *,
    axes: Axes | None = None,
    controls: Mapping[str, float] | None = None,
    tested: Collection[str] | None = None,
    base_size: int | None = None,
    sigma: float | None = None,
    initial_loss: float | None = None,
    doubts: Sequence[Doubt] = (),
    accept: Collection[str] = (),
    notes: Sequence[str] = (),
    curves: Mapping[CurveKey, Array] | None = None,
    thresholds: Thresholds | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> TransferResult:
    """Optima, drift, regret and verdict for every arm of a sweep. The same arguments give the same numbers.

    Args:
        points: The finished runs.
        axes: What was scaled and what was tuned, by default learning rate over width.
        controls: Arm -> predicted drift in log2 per doubling, for arms built to fail; if one does not, nothing passes.
        tested: Arms that the verdict is about, by default all but the controls; others are measured for comparison.
        base_size: Where the hyperparameter would be tuned; default: the smallest size.
        sigma: Standard deviation of the loss between runs that differ only in chance; for where no point was run with two
            seeds, refused where one was.
        initial_loss: Runs that end at or above it count as diverged; if it is not known, those far above the lowest loss.
        doubts: Whether the runs are what they claim; any that is not in `accept`, by its kind, makes INCONCLUSIVE of a
            verdict.
        accept: Kinds of doubts that are set aside.
        notes: What else is known about the runs.
        curves: (arm, size, value, seed) -> (T, 2) step and training loss, for "larger is better".
        thresholds: Every number that decides a verdict.
        resamples: Rows of noise behind each interval.
        seed: Of the resampling.

    Raises:
        TransferError: In one line, for runs that cannot be measured.
    """
    axes, controls, curves, thresholds = axes or Axes(), controls or {}, curves or {}, thresholds or Thresholds()
    placed = _by_size(points, axes)
    tested = set(placed) - set(controls) if tested is None else set(tested)
    _check_arms(placed, tested, controls, base_size, axes)
    known = {doubt.kind for doubt in doubts}
    doubts = [*doubts, *(doubt for doubt in _other_sizes(placed, axes) if doubt.kind not in known)]
    losses = [point.loss for sizes in placed.values() for some in sizes.values() for point in some]
    initial_loss = min(beyond_any_start(losses) if initial_loss is None else initial_loss, HUGE)
    if exploded := sum(initial_loss <= loss < math.inf for loss in losses):
        notes = [*notes, f"{exploded} runs ended at a loss of {initial_loss:.4g} or more: counted as diverged"]
    tables, problems = {}, {}
    for arm, sizes in placed.items():
        built = [build_loss_table(axes, size, sizes[size], initial_loss) for size in sorted(sizes)]
        tables[arm] = [table for table in built if isinstance(table, LossTable)]
        problems[arm] = [table for table in built if isinstance(table, str)]
    everywhere = [table for arm in tables.values() for table in arm]
    refuse_copies(tables, sigma is not None or any(len(table.seeds) > 1 for table in everywhere), thresholds)
    arms = {}
    for arm in placed:
        noise = Noise.of(tables[arm], everywhere, sigma, thresholds)
        fits = tuple(fit_size(arm, table, noise, thresholds, resamples, seed) for table in tables[arm])
        base = base_size or min(placed[arm])
        rng = np.random.default_rng([seed, *arm.encode()])
        arms[arm] = measure_arm(arm, axes, base, fits, problems[arm], noise, controls.get(arm), curves, thresholds, rng)
    notes = [*notes, *(text for one in arms.values() for text in _alike(one, thresholds))]
    counted = [doubt for doubt in doubts if doubt.arm is None or doubt.arm in tested | set(controls)]
    return _doubting(axes, arms, tested, thresholds, counted, accept, tuple(notes))


def _alike(arm: ArmResult, thresholds: Thresholds) -> Iterator[str]:
    """A line if noise hides what size does to the loss: of a program that ignores it, all else looks well."""
    usable = arm.usable
    if len(usable) < 2 or usable[-1].size < thresholds.min_span * usable[0].size:
        return
    losses = [arm.best_loss(fit) for fit in usable]
    lows, highs = zip(*(loss.interval() for loss in losses))
    values = [loss.value for loss in losses]
    near = max(values) - min(values) <= NO_GAIN * max(map(abs, values))
    if near and max(lows) <= min(highs):  # never where noise is unknown
        span = f"{arm.axes.plural} {usable[0].size} to {usable[-1].size} have the same loss up to noise"
        found = f"{min(values):.4f} to {max(values):.4f}, each at its best"
        yield f"arm {printable(arm.arm, 60)}: {span} ({found}); see if the {arm.axes.size} reaches the runs"


def _by_size(points: Iterable[Point], axes: Axes) -> dict[str, dict[int, list[Point]]]:
    """arm -> size -> points. Raises TransferError for none, for one that is there twice, for one without the size, and for
    more than can be measured."""
    placed: dict[str, dict[int, list[Point]]] = defaultdict(lambda: defaultdict(list))
    places = set()
    for point in points:
        if (size := point.sizes.get(axes.size)) is None:
            have = ", ".join(map(printable, point.sizes)) or "none"
            raise TransferError(
                f"a run without {with_article(printable(axes.size, 60))}; it has {have}: name one of these as the size axis"
            )
        place = point.arm, size, point.log2_value, point.seed
        if place in places:
            same = f"arm {printable(point.arm, 60)}, {axes.at(size)}, {axes.short} {point.value:g}, seed {point.seed}"
            raise TransferError(f"two runs of {same}; drop one, as all other settings must be the same")
        places.add(place)
        placed[point.arm][size].append(point)
    if not placed:
        raise TransferError("no runs: give one Point per finished run")
    if (count := sum(map(len, placed.values()))) > MOST_SIZES:
        have = f"{len(placed)} arms with {count} {axes.plural} in all"
        raise TransferError(f"{have}; at most {MOST_SIZES} are measured at a time: split the table")
    return placed


def _other_sizes(placed: Mapping[str, Mapping[int, Sequence[Point]]], axes: Axes) -> Iterator[Doubt]:
    """A doubt for every other size axis on which the runs of one arm differ; a diverged run may have ended early."""
    for arm, sizes in placed.items():
        stable = [point for some in sizes.values() for point in some if math.isfinite(point.loss)]
        for name in sorted({name for point in stable for name in point.sizes} - {axes.size}):
            values: dict[int, list[Point]] = defaultdict(list)
            for point in stable:
                if name in point.sizes:
                    values[point.sizes[name]].append(point)
            pairs = [(float(point.sizes[axes.size]), float(size)) for size, some in values.items() for point in some]
            if max(values) - min(values) > ROUNDED * max(values) and not axes.scale.leads(name, pairs):
                told = {str(value): some for value, some in values.items()}
                yield values_doubt(name, told, axes, arm if len(placed) > 1 else None)


def _check_arms(
    placed: Mapping[str, Mapping[int, Sequence[Point]]],
    tested: Collection[str],
    controls: Mapping[str, float],
    base_size: int | None,
    axes: Axes,
) -> None:
    """Raises TransferError if arms or sizes that are named were not run."""
    have = ", ".join(printable(arm, 60) for arm in list(placed)[:20])
    for arm in sorted(set(tested) - set(placed)):
        raise TransferError(f"arm {printable(arm, 60)!r} is to be tested but was not run; there are {have}")
    for arm, predicted in controls.items():
        if arm not in placed:
            raise TransferError(
                f"control {printable(arm, 60)!r} is not among the arms ({have}); run it or do not name it"
            )
        if not predicted:
            raise TransferError(f"control {arm!r}: a predicted drift of 0 cannot fail; give the drift its error causes")
    for arm, sizes in placed.items():
        if base_size is not None and base_size not in sizes:
            there = ", ".join(map(str, sorted(sizes)[:20]))
            raise TransferError(
                f"--base-size {base_size:.20g}: was not run in arm {printable(arm, 60)}; it has {there}"
            )


def beyond_any_start(losses: Sequence[float]) -> float:
    """The loss from which on a run has exploded, though it is finite, in a table that does not say where runs began."""
    lowest = min((loss for loss in losses if abs(loss) < HUGE), default=HUGE)
    return lowest + EXPLODED * max(abs(lowest), 1.0)


def _doubting(
    axes: Axes,
    arms: Mapping[str, ArmResult],
    tested: Collection[str],
    thresholds: Thresholds,
    doubts: Sequence[Doubt],
    accept: Collection[str],
    notes: tuple[str, ...],
) -> TransferResult:
    """The result over all arms; where a doubt is open, nothing passes or fails, and the doubt comes first."""
    left = open_doubts(doubts, accept)
    about = {arm: [doubt.text for doubt in left if doubt.arm in (None, arm)] for arm in arms}
    judged = {arm: replace(one, verdict=Verdict.INCONCLUSIVE) if about[arm] else one for arm, one in arms.items()}
    verdict, reasons = _overall(judged, tested, thresholds)
    told = {arm: replace(one, reasons=(*about[arm], *one.reasons)) for arm, one in judged.items()}
    texts = tuple(f"arm {doubt.arm}: {doubt.text}" if doubt.arm else doubt.text for doubt in left)
    notes += tuple(f"accepted: {doubt.text}" for doubt in doubts if doubt not in left)
    return TransferResult(
        axes, told, Verdict.INCONCLUSIVE if left else verdict, (*texts, *reasons), thresholds, tuple(left), notes
    )


def _beaten(tested: ArmResult, arms: Iterable[ArmResult]) -> Iterator[str]:
    """A sentence if at the largest size another arm has a lower loss by more than noise: transfer is not everything."""
    if not tested.usable:
        return
    mine = tested.usable[-1]
    rivals = [(other, fit) for other in arms if other is not tested for fit in other.usable if fit.size == mine.size]
    if not rivals:
        return
    other, fit = min(rivals, key=lambda rival: rival[1].best_losses[0])
    low, _ = tested.best_loss(mine).interval()
    _, high = other.best_loss(fit).interval()
    if low > high:
        gap = mine.best_losses[0] - fit.best_losses[0]
        yield f"but arm {other.arm} has the lower loss at {mine.place}, by {gap:.3f} nats, each at its best"


def _overall(
    arms: Mapping[str, ArmResult], names: Collection[str], thresholds: Thresholds
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict over the arms `names`: nothing counts unless every control failed the way its error predicts."""
    controls = [result for result in arms.values() if result.predicted is not None]
    tested = [result for result in arms.values() if result.arm in names and result.predicted is None]
    if not tested:
        raise TransferError(f"every arm ({', '.join(arms)}) is a control or left out; nothing is left to judge")
    verdict = worst(result.verdict for result in tested)
    reasons = [f"arm {result.arm}: {result.verdict}, {text}" for result in tested for text in result.reasons]
    reasons += [text for result in tested for text in _beaten(result, arms.values())]
    if not controls:
        reasons.append("no control arm: nothing shows that this sweep would have noticed a wrong rule")
    for result in controls:
        sign = math.copysign(1.0, result.predicted or 0.0)
        need = f"{'above' if sign > 0 else 'below'} {sign * thresholds.equivalence:+g}"
        low, high = result.drift.interval() if result.drift else (math.nan, math.nan)
        enough = len(result.usable) >= thresholds.min_sizes
        if enough and min(sign * low, sign * high) > thresholds.equivalence:
            reasons.append(f"control {result.arm} failed as predicted ({result.predicted:+g}): drift {result.drift}")
        else:
            verdict = Verdict.INCONCLUSIVE
            found = f"drift {result.drift}" if enough and result.drift else "; ".join(result.reasons)
            reasons.insert(0, f"control {result.arm} did not fail as predicted: {found}; the interval must lie {need}")
    return verdict, tuple(reasons)
