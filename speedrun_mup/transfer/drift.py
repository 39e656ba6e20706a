"""Drift: how far the optimum moves per doubling of the size, what that costs at the largest one, and the verdict on one arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from speedrun_mup.transfer.axes import Axes
from speedrun_mup.transfer.fits import Array, Estimate, Noise, SizeFit, optima, propagate, slope_weights
from speedrun_mup.transfer.larger import larger_is_better
from speedrun_mup.transfer.points import CurveKey
from speedrun_mup.transfer.results import ArmResult
from speedrun_mup.transfer.thresholds import Thresholds, Verdict

MOST_SEEDS_WORTH = 10  # times those there are; beyond, the sweep is wrong and not small
TOO_NOISY = "far too noisy for more seeds to settle it: train longer, or on a wider span of"


def measure_arm(
    arm: str,
    axes: Axes,
    base_size: int,
    fits: tuple[SizeFit, ...],
    problems: Sequence[str],
    noise: Noise,
    predicted: float | None,
    curves: Mapping[CurveKey, Array],
    thresholds: Thresholds,
    rng: np.random.Generator,
) -> ArmResult:
    """Drift, regret, "larger is better" and the verdict of one arm.

    Args:
        arm: its name.
        axes: what was scaled and what was tuned.
        base_size: where the hyperparameter would be tuned.
        fits: of its sizes, ascending.
        problems: sizes that could not be fitted, a sentence each.
        noise: of its losses.
        predicted: the drift of a control.
        curves: of all arms, as `measure_transfer` takes them.
        thresholds: what decides the verdict.
        rng: of the resampling.
    """
    usable = [fit for fit in fits if not fit.problems]
    base = next((fit for fit in usable if fit.size == base_size), None)
    trouble = [*problems, *(text for fit in fits for text in fit.problems)]
    drift = shift = regret = larger = None
    if len(usable) > 1:
        weights, (wide, narrow) = slope_weights(usable), optima(usable)
        drift = Estimate(propagate(weights * wide, usable, noise, rng))
        shift = Estimate((weights * (narrow - wide)).sum(axis=0))
        trouble += _scatter(usable, drift.value, thresholds)
    if base:
        regret = Estimate(_regret(base, usable[-1], noise, rng))
    mine = {key: curve for key, curve in curves.items() if key[0] == arm}
    if base and mine:
        larger = larger_is_better(mine, base.optimum, axes, thresholds)
    verdict, reasons = _judge_arm(axes, fits, usable, drift, shift, regret, trouble, thresholds)
    return ArmResult(
        arm, axes, base_size, fits, drift, shift, regret, noise, predicted, larger, verdict, tuple(reasons)
    )


def _regret(base: SizeFit, largest: SizeFit, noise: Noise, rng: np.random.Generator) -> Array:
    """Nats lost at `largest` by the optimum of `base`, (R,); what separates the optima is spread out to Student's t."""
    if base is largest:
        return np.zeros(len(base.means))
    apart = propagate(np.stack([base.quadratic.vertex, -largest.quadratic.vertex]), (base, largest), noise, rng)
    return largest.loss_at(largest.quadratic.vertex + apart) - largest.quadratic.min_loss


def _scatter(usable: Sequence[SizeFit], drift: float, thresholds: Thresholds) -> tuple[str, ...]:
    """A sentence if the optima do not lie on a line, so that a small slope would say little."""
    at = np.array([fit.optimum for fit in usable])
    errors = np.nan_to_num([fit.optimum_se for fit in usable])
    doublings = np.log2([fit.size for fit in usable])
    weights = [fit.weight for fit in usable]
    rest = at - np.average(at, weights=weights) - drift * (doublings - np.average(doublings, weights=weights))
    excess = np.abs(rest) - np.maximum(thresholds.max_scatter, 3 * errors)
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return ()
    return (
        f"{usable[worst].place}: optimum {rest[worst]:+.2f} (log2) off the line through all {usable[worst].table.axes.plural}",
    )


def _judge_arm(
    axes: Axes,
    fits: Sequence[SizeFit],
    usable: Sequence[SizeFit],
    drift: Estimate | None,
    shift: Estimate | None,
    regret: Estimate | None,
    trouble: Sequence[str],
    thresholds: Thresholds,
) -> tuple[Verdict, list[str]]:
    """One arm's verdict with its reasons: what blocks a verdict, else what fails, else what falls short of a pass."""
    if drift is None or shift is None:
        return Verdict.INCONCLUSIVE, [*trouble, f"{len(usable)} usable {axes.plural}: no drift without two"]
    measured = f"drift {drift} in log2 per doubling"
    blocked = list(trouble)
    sizes = [fit.size for fit in fits]
    if len(sizes) < thresholds.min_sizes or sizes[-1] < thresholds.min_span * sizes[0]:
        need = f"{thresholds.min_sizes} {axes.plural} that span a factor of {thresholds.min_span:g}"
        blocked.append(f"{axes.plural} {', '.join(map(str, sizes))} are too few or too close: needs {need}")
    if math.isnan(drift.interval()[0]):
        blocked.append(
            "the noise is unknown: run some points with a second seed, or give its standard deviation, such as --sigma 0.005"
        )
    if blocked:
        return Verdict.INCONCLUSIVE, [*blocked, f"{measured} over {len(usable)} {axes.plural}"]

    largest = usable[-1]
    allowed = thresholds.allowed_regret(largest.sigma)
    cost = f"regret {regret.value:.4f} nats at {largest.place}, allowed {allowed:.4f}" if regret else ""
    if regret and math.isinf(regret.value):
        cost = f"{largest.place} diverges at the base {axes.size}'s optimum"
    return judged(drift, shift, regret, allowed, axes, thresholds, measured, cost)


def judged(
    drift: Estimate,
    shift: Estimate,
    regret: Estimate | None,
    allowed: float,
    axes: Axes,
    thresholds: Thresholds,
    measured: str,
    cost: str,
) -> tuple[Verdict, list[str]]:
    """The verdict on a drift that nothing blocks, with its reasons: what fails, else what falls short of a pass.

    Args:
        drift: Log2 per doubling, off what is predicted.
        shift: What the narrow window would add to it.
        regret: Nats lost at the largest size.
        allowed: Of these.
        axes: What was scaled and tuned.
        thresholds: What decides.
        measured: The drift, for a reader.
        cost: The regret, for a reader.
    """
    bound, (low, high) = thresholds.max_drift, drift.interval()
    failed = []
    if low > bound or high < -bound:
        failed.append(f"{measured}: beyond the tolerated +-{bound:g}")
    if regret and regret.interval()[0] > allowed:
        failed.append(cost)
    if failed:
        return Verdict.FAIL, failed

    short = _short_of_a_pass(drift, shift, axes, thresholds)
    if regret and regret.value > allowed:
        short.append(f"{cost}, but noise could explain it")
    if short:
        return Verdict.INCONCLUSIVE, short
    return Verdict.PASS, [f"{measured}: inside +-{thresholds.equivalence:g}, and at most {bound:g}", cost]


def _short_of_a_pass(drift: Estimate, shift: Estimate, axes: Axes, thresholds: Thresholds) -> list[str]:
    """Why a drift that does not fail is no pass either, with what would settle it."""
    limit, bound = thresholds.equivalence, thresholds.max_drift
    low, high = drift.interval()
    measured, short = f"drift {drift} in log2 per doubling", []
    if not -limit < low <= high < limit:
        text = f"{measured}: the interval is not inside +-{limit:g}"
        if abs(drift.value) < bound:
            reach = max(high - drift.value, drift.value - low)
            more = max(2, math.ceil((reach / (limit - abs(drift.value))) ** 2))
            enough = f"about {more} times the seeds would settle it"
            text += f"; {enough}" if more <= MOST_SEEDS_WORTH else f"; {TOO_NOISY} {axes.plural}"
        else:
            text += f"; a {axes.scale.larger} {axes.size} would settle it sooner than more seeds"
        short.append(text)
    elif abs(drift.value) > bound:
        short.append(f"{measured}: more than {bound:g}, but not certainly")
    narrowly = drift.value + shift.value
    if abs(shift.value) > 2 * shift.se and (abs(shift.value) > thresholds.max_window_shift or abs(narrowly) > bound):
        narrow = f"drift {narrowly:+.3f} from the narrow window, {drift.value:+.3f} from the wide one"
        short.append(f"{narrow}: the answer depends on the window; add half-step points near the optima")
    return short
