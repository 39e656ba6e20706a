"""The measurement: optima, drift, regret and the equivalence test, from runs to verdict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from speedrun_mup.files import printable
from speedrun_mup.transfer.claims import Doubt, open_doubts, refuse_copies
from speedrun_mup.transfer.fits import (
    Array,
    Cells,
    Estimate,
    Noise,
    WidthFit,
    drift_line,
    fit_width,
    summed,
    table_of,
    vertices,
)
from speedrun_mup.transfer.results import ArmResult, TransferResult
from speedrun_mup.transfer.runs import LR, CurveKey, Run, TransferError
from speedrun_mup.transfer.thresholds import Thresholds, Verdict
from speedrun_mup.transfer.wider import wider_is_better

MOST_WIDTHS = 600  # curves of one width and one arm, of all arms together
# Of a table that does not say where its runs began: a loss that lies further above the lowest than this many times that, or
# than so many nats, whichever is more, was no model any more.
EXPLODED = 10.0
NO_GAIN = 0.01  # of the loss: less than four times the width gives in any sweep of ours
HUGE = 1e30  # a loss beyond this is no number, whatever the others are
MOST_SEEDS_WORTH = 10  # times those there are; beyond, the sweep is wrong and not small
TOO_NOISY = "far too noisy for more seeds to settle it: train longer, or on a wider span of widths"


def measure_transfer(
    runs: Iterable[Run],
    *,
    controls: Mapping[str, float] | None = None,
    tested: Collection[str] | None = None,
    base_width: int | None = None,
    sigma: float | None = None,
    initial_loss: float | None = None,
    doubts: Sequence[Doubt] = (),
    accept: Collection[str] = (),
    notes: Sequence[str] = (),
    curves: Mapping[CurveKey, Array] | None = None,
    thresholds: Thresholds | None = None,
    resamples: int = 2000,
    seed: int = 0,
    knob: str = LR,
) -> TransferResult:
    """Optima, drift, regret and verdict for every arm of a sweep.

    controls: arm -> predicted drift in octaves per doubling, for arms built to fail; if one does not, nothing passes.
    tested: arms that the verdict is about, by default all but the controls; any others are measured for comparison.
    base_width: where the learning rate would be tuned; default: the narrowest. sigma: standard deviation of the loss
    between runs that differ only in chance; for where no point was run with two seeds, refused where one was.
    initial_loss: runs that end at or above it count as diverged; if it is not known, those far above the lowest loss.
    doubts: whether the runs are what they claim; any that is not in `accept`, by its kind, makes INCONCLUSIVE of a verdict.
    notes: what else there is to say of the runs. curves: (arm, width, lr, seed) -> (T, 2) step and
    training loss, for "wider is better". knob: what was turned, for the words. The same arguments give
    the same numbers. Raises TransferError.
    """
    controls, curves, thresholds = controls or {}, curves or {}, thresholds or Thresholds()
    table = _by_width(runs)
    tested = set(table) - set(controls) if tested is None else set(tested)
    _check_arms(table, tested, controls, base_width)
    losses = [run.loss for widths in table.values() for some in widths.values() for run in some]
    initial_loss = min(_beyond_any_start(losses) if initial_loss is None else initial_loss, HUGE)
    if exploded := sum(initial_loss <= loss < math.inf for loss in losses):
        notes = [*notes, f"{exploded} runs ended at a loss of {initial_loss:.4g} or more: counted as diverged"]
    cells, problems = {}, {}
    for arm, widths in table.items():
        sorted_cells = [table_of(width, widths[width], initial_loss) for width in sorted(widths)]
        cells[arm] = [cell for cell in sorted_cells if isinstance(cell, Cells)]
        problems[arm] = [cell for cell in sorted_cells if isinstance(cell, str)]
    everywhere = [cell for arm in cells.values() for cell in arm]
    refuse_copies(cells, sigma is not None or any(len(cell.seeds) > 1 for cell in everywhere), thresholds)
    arms = {}
    for arm in table:
        noise = Noise.of(cells[arm], everywhere, sigma, thresholds)
        fits = tuple(fit_width(arm, cell, noise, thresholds, resamples, seed) for cell in cells[arm])
        base = base_width or min(table[arm])
        rng = np.random.default_rng([seed, *arm.encode()])
        arms[arm] = _measure_arm(
            arm, base, fits, problems[arm], noise, controls.get(arm), curves, thresholds, rng, knob
        )
    notes = [*notes, *(text for one in arms.values() for text in _alike(one, thresholds))]
    counted = [doubt for doubt in doubts if doubt.arm is None or doubt.arm in tested | set(controls)]
    return _doubting(arms, tested, thresholds, counted, accept, tuple(notes))


def _alike(arm: ArmResult, thresholds: Thresholds) -> Iterator[str]:
    """A line if noise hides what width does to the loss: of a program that ignores the width, all else looks well."""
    usable = arm.usable
    if len(usable) < 2 or usable[-1].width < thresholds.min_span * usable[0].width:
        return
    losses = [arm.best_loss(fit) for fit in usable]
    lows, highs = zip(*(loss.interval() for loss in losses))
    values = [loss.value for loss in losses]
    near = max(values) - min(values) <= NO_GAIN * max(map(abs, values))
    if near and max(lows) <= min(highs):  # never where noise is unknown
        span = f"widths {usable[0].width} to {usable[-1].width} have the same loss up to noise"
        found = f"{min(values):.4f} to {max(values):.4f}, each at its best"
        yield f"arm {printable(arm.arm, 60)}: {span} ({found}); see if the width reaches the runs"


def _by_width(runs: Iterable[Run]) -> dict[str, dict[int, list[Run]]]:
    """arm -> width -> runs. Raises TransferError for none, for one that is there twice, and for more than can be measured."""
    table: dict[str, dict[int, list[Run]]] = defaultdict(lambda: defaultdict(list))
    places = set()
    for run in runs:
        place = run.arm, run.width, run.log2_lr, run.seed
        if place in places:
            same = f"arm {printable(run.arm, 60)}, width {run.width}, lr {run.lr:g}, seed {run.seed}"
            raise TransferError(f"two runs of {same}; drop one, as all other settings must be the same")
        places.add(place)
        table[run.arm][run.width].append(run)
    if not table:
        raise TransferError("no runs: give one Run per finished run")
    if (count := sum(map(len, table.values()))) > MOST_WIDTHS:
        have = f"{len(table)} arms with {count} widths in all"
        raise TransferError(f"{have}; at most {MOST_WIDTHS} are measured at a time: split the table")
    return table


def _check_arms(
    table: Mapping[str, Mapping[int, Sequence[Run]]],
    tested: Collection[str],
    controls: Mapping[str, float],
    base_width: int | None,
) -> None:
    """Raises TransferError if arms or widths that are named were not run."""
    have = ", ".join(printable(arm, 60) for arm in list(table)[:20])
    for arm in sorted(set(tested) - set(table)):
        raise TransferError(f"arm {printable(arm, 60)!r} is to be tested but was not run; there are {have}")
    for arm, predicted in controls.items():
        if arm not in table:
            raise TransferError(
                f"control {printable(arm, 60)!r} is not among the arms ({have}); run it or do not name it"
            )
        if not predicted:
            raise TransferError(f"control {arm!r}: a predicted drift of 0 cannot fail; give the drift its error causes")
    for arm, widths in table.items():
        if base_width is not None and base_width not in widths:
            there = ", ".join(map(str, sorted(widths)[:20]))
            raise TransferError(
                f"--base-width {base_width:.20g}: was not run in arm {printable(arm, 60)}; it has {there}"
            )


def _beyond_any_start(losses: Sequence[float]) -> float:
    """The loss from which on a run has exploded, though it is finite, in a table that does not say where runs began."""
    lowest = min((loss for loss in losses if abs(loss) < HUGE), default=HUGE)
    return lowest + EXPLODED * max(abs(lowest), 1.0)


def _doubting(
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
        told, Verdict.INCONCLUSIVE if left else verdict, (*texts, *reasons), thresholds, tuple(left), notes
    )


def _measure_arm(
    arm: str,
    base_width: int,
    fits: tuple[WidthFit, ...],
    problems: Sequence[str],
    noise: Noise,
    predicted: float | None,
    curves: Mapping[CurveKey, Array],
    thresholds: Thresholds,
    rng: np.random.Generator,
    knob: str,
) -> ArmResult:
    """Drift, regret, "wider is better" and the verdict of one arm."""
    usable = [fit for fit in fits if not fit.problems]
    base = next((fit for fit in usable if fit.width == base_width), None)
    trouble = [*problems, *(text for fit in fits for text in fit.problems)]
    drift = shift = regret = wider = None
    if len(usable) > 1:
        line, (optima, narrow) = drift_line(usable), vertices(usable)
        drift = Estimate(summed(line * optima, usable, noise, rng))
        shift = Estimate((line * (narrow - optima)).sum(axis=0))
        trouble += _scatter(usable, drift.value, thresholds)
    if base:
        regret = Estimate(_regret(base, usable[-1], noise, rng))
    mine = {key: curve for key, curve in curves.items() if key[0] == arm}
    if base and mine:
        wider = wider_is_better(mine, base.optimum, thresholds)
    verdict, reasons = _judge(fits, usable, drift, shift, regret, trouble, thresholds)
    return ArmResult(
        arm, base_width, fits, drift, shift, regret, noise, predicted, wider, verdict, tuple(reasons), knob
    )


def _regret(base: WidthFit, widest: WidthFit, noise: Noise, rng: np.random.Generator) -> Array:
    """Nats lost at `widest` by the optimum of `base`, (R,); what separates the optima is spread out to Student's t."""
    if base is widest:
        return np.zeros(len(base.means))
    apart = summed(np.stack([base.bowls.vertex, -widest.bowls.vertex]), (base, widest), noise, rng)
    return widest.loss_at(widest.bowls.vertex + apart) - widest.bowls.floor


def _scatter(usable: Sequence[WidthFit], drift: float, thresholds: Thresholds) -> tuple[str, ...]:
    """A sentence if the optima do not lie on a line, so that a small slope would say little."""
    optima = np.array([fit.optimum for fit in usable])
    errors = np.nan_to_num([fit.optimum_se for fit in usable])
    doublings = np.log2([fit.width for fit in usable])
    weights = [fit.weight for fit in usable]
    rest = optima - np.average(optima, weights=weights) - drift * (doublings - np.average(doublings, weights=weights))
    excess = np.abs(rest) - np.maximum(thresholds.max_scatter, 3 * errors)
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return ()
    return (f"width {usable[worst].width}: optimum {rest[worst]:+.2f} octaves off the line through all widths",)


def _judge(
    fits: Sequence[WidthFit],
    usable: Sequence[WidthFit],
    drift: Estimate | None,
    shift: Estimate | None,
    regret: Estimate | None,
    trouble: Sequence[str],
    thresholds: Thresholds,
) -> tuple[Verdict, list[str]]:
    """One arm's verdict with its reasons: what blocks a verdict, else what fails, else what falls short of a pass."""
    if drift is None or shift is None:
        return Verdict.INCONCLUSIVE, [*trouble, f"{len(usable)} usable widths: no drift without two"]
    limit, bound = thresholds.equivalence, thresholds.max_drift
    low, high = drift.interval()
    measured = f"drift {drift} octave per doubling"
    blocked = list(trouble)
    widths = [fit.width for fit in fits]
    if len(widths) < thresholds.min_widths or widths[-1] < thresholds.min_span * widths[0]:
        need = f"{thresholds.min_widths} widths that span a factor of {thresholds.min_span:g}"
        blocked.append(f"widths {', '.join(map(str, widths))} are too few or too close: needs {need}")
    if math.isnan(low):
        blocked.append(
            "the noise is unknown: run some points with a second seed, or give its standard deviation, such as --sigma 0.005"
        )
    if blocked:
        return Verdict.INCONCLUSIVE, [*blocked, f"{measured} over {len(usable)} widths"]

    widest = usable[-1]
    allowed = max(thresholds.max_regret, thresholds.regret_sigmas * (widest.sigma or 0.0))
    cost = f"regret {regret.value:.4f} nats at width {widest.width}, allowed {allowed:.4f}" if regret else ""
    if regret and math.isinf(regret.value):
        cost = f"width {widest.width} diverges at the base width's optimum"
    failed = []
    if low > bound or high < -bound:
        failed.append(f"{measured}: beyond the tolerated +-{bound:g}")
    if regret and regret.interval()[0] > allowed:
        failed.append(cost)
    if failed:
        return Verdict.FAIL, failed

    short = []
    reach = max(high - drift.value, drift.value - low)
    if not -limit < low <= high < limit:
        text = f"{measured}: the interval is not inside +-{limit:g}"
        if abs(drift.value) < bound:
            more = max(2, math.ceil((reach / (limit - abs(drift.value))) ** 2))
            text += f"; about {more} times the seeds would settle it" if more <= MOST_SEEDS_WORTH else f"; {TOO_NOISY}"
        else:
            text += "; a wider width would settle it sooner than more seeds"
        short.append(text)
    elif abs(drift.value) > bound:
        short.append(f"{measured}: more than {bound:g}, but not surely")
    if regret and regret.value > allowed:
        short.append(f"{cost}, but noise could explain it")
    narrowly = drift.value + shift.value
    if abs(shift.value) > 2 * shift.se and (abs(shift.value) > thresholds.max_window_shift or abs(narrowly) > bound):
        narrow = f"drift {narrowly:+.3f} from the narrow window, {drift.value:+.3f} from the wide one"
        short.append(f"{narrow}: the answer depends on the window; add half-octave points near the optima")
    if short:
        return Verdict.INCONCLUSIVE, short
    return Verdict.PASS, [f"{measured}: inside +-{limit:g}, and at most {bound:g}", cost]


def _beaten(tested: ArmResult, arms: Iterable[ArmResult]) -> Iterator[str]:
    """A sentence if at the widest width another arm has a lower loss by more than noise: transfer is not everything."""
    if not tested.usable:
        return
    mine = tested.usable[-1]
    rivals = [(other, fit) for other in arms if other is not tested for fit in other.usable if fit.width == mine.width]
    if not rivals:
        return
    other, fit = min(rivals, key=lambda rival: rival[1].best_losses[0])
    low, _ = tested.best_loss(mine).interval()
    _, high = other.best_loss(fit).interval()
    if low > high:
        gap = mine.best_losses[0] - fit.best_losses[0]
        yield f"but arm {other.arm} has the lower loss at width {mine.width}, by {gap:.3f} nats, each at its best"


def _overall(
    arms: Mapping[str, ArmResult], names: Collection[str], thresholds: Thresholds
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict over the arms `names`: nothing counts unless every control failed the way its error predicts."""
    controls = [result for result in arms.values() if result.predicted is not None]
    tested = [result for result in arms.values() if result.arm in names and result.predicted is None]
    if not tested:
        raise TransferError(f"every arm ({', '.join(arms)}) is a control or left out; nothing is left to judge")
    verdicts = {result.verdict for result in tested}
    verdict = next(v for v in (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS) if v in verdicts)
    reasons = [f"arm {result.arm}: {result.verdict}, {text}" for result in tested for text in result.reasons]
    reasons += [text for result in tested for text in _beaten(result, arms.values())]
    if not controls:
        reasons.append("no control arm: nothing shows that this sweep would have noticed a wrong rule")
    for result in controls:
        sign = math.copysign(1.0, result.predicted or 0.0)
        need = f"{'above' if sign > 0 else 'below'} {sign * thresholds.equivalence:+g}"
        low, high = result.drift.interval() if result.drift else (math.nan, math.nan)
        enough = len(result.usable) >= thresholds.min_widths
        if enough and min(sign * low, sign * high) > thresholds.equivalence:
            reasons.append(f"control {result.arm} failed as predicted ({result.predicted:+g}): drift {result.drift}")
        else:
            verdict = Verdict.INCONCLUSIVE
            found = f"drift {result.drift}" if enough and result.drift else "; ".join(result.reasons)
            reasons.insert(0, f"control {result.arm} did not fail as predicted: {found}; the interval must lie {need}")
    return verdict, tuple(reasons)
