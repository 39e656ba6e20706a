"""Losses of arms with and without a technique -> its gain at every width, with intervals, and a verdict. Pure functions.

A arms, W widths, R learning rates, S seeds, T techniques. Every arm is taken at the rate that is best for it at a width. All
arms have the same seeds, so a run is the sum of what its arm and its seed come to, and noise; the noise of a width is what is
left of all its runs after both (analysis of variance in two ways), on (A - 1)(S - 1) degrees of freedom. A gain is a mean over
seeds of the difference of two arms.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
LEVEL = 0.05  # of false alarms over all techniques together
UNLIKE = 0.01  # below this probability a technique's own noise counts, and not the common one
RETAINED = 0.5  # a gain that holds keeps more than this share from the smallest to the largest width


class Verdict(enum.Enum):
    """What becomes of a gain as models get wider."""

    GROWS = "GROWS"
    HOLDS = "HOLDS"
    FADES = "FADES"
    HURTS = "HURTS"
    INCONCLUSIVE = "INCONCLUSIVE"


class Estimated(NamedTuple):
    """A number with its variance and the degrees of freedom that the variance has."""

    value: float
    variance: float
    freedom: float

    @property
    def p(self) -> float:
        """Probability of a value as far from 0, either way, if it is 0."""
        if self.variance <= 0:
            return 0.0 if self.value else 1.0
        return 2 * student_tail(abs(self.value) / math.sqrt(self.variance), self.freedom)

    def reach(self, level: float) -> float:
        """Half of the width of an interval that misses with probability `level`."""
        return student_quantile(1 - level / 2, self.freedom) * math.sqrt(self.variance)


@dataclass(frozen=True)
class Finding:
    """What was measured of one technique.

    Args:
        name: The technique.
        gains: Loss without it minus loss with it, in nats, of every width.
        mean: Over widths. slope: Per doubling of width.
        p: Of no effect at all, adjusted for all techniques that were judged together.
        reach: Of the gain at each width either way, for all techniques and widths together.
        verdict: What becomes of it.
    """

    name: str
    gains: tuple[Estimated, ...]
    mean: Estimated
    slope: Estimated
    p: float
    reach: tuple[float, ...]
    verdict: Verdict


def best_rates(losses: Array) -> npt.NDArray[np.int64]:
    """(A, W, R, S) -> (A, W): the rate with the lowest mean loss; -1 where a run diverged at every one. nan is diverged."""
    means = np.where(np.isnan(losses).any(axis=-1), np.inf, losses.mean(axis=-1))
    return np.where(np.isfinite(means).any(axis=-1), means.argmin(axis=-1), -1)


def at_best_rates(losses: Array) -> Array:
    """(A, W, R, S) -> (A, W, S): nan where every rate diverged."""
    best = best_rates(losses)
    chosen = np.take_along_axis(losses, np.maximum(best, 0)[..., None, None], axis=2)[:, :, 0]
    return np.where(best[..., None] < 0, np.nan, chosen)


def noise_of(losses: Array) -> tuple[float, float]:
    """(A, S) of one width -> variance of a run's noise and its degrees of freedom. Arms with a nan are left out."""
    whole = losses[~np.isnan(losses).any(axis=1)]
    freedom = (len(whole) - 1) * (whole.shape[1] - 1)
    if freedom < 1:
        return math.nan, 0.0
    left = whole - whole.mean(axis=1, keepdims=True) - whole.mean(axis=0, keepdims=True) + whole.mean()
    return float((left**2).sum() / freedom), float(freedom)


def gain_of(with_it: Array, without: Array, noise: tuple[float, float]) -> Estimated:
    """(S,) and (S,) -> the mean difference. The pair's own noise counts where it is too large to be the common one."""
    difference, seeds = without - with_it, len(with_it)
    common, freedom = noise
    own = float(difference.var(ddof=1)) if seeds > 1 else math.nan
    if seeds > 1 and common > 0 and fisher_tail(own / (2 * common), seeds - 1, freedom) < UNLIKE:
        return Estimated(float(difference.mean()), own / seeds, seeds - 1)
    return Estimated(float(difference.mean()), 2 * common / seeds, freedom)


def judge(names: Sequence[str], gains: Sequence[Sequence[Estimated]], widths: Sequence[int]) -> list[Finding]:
    """A finding for each technique; a gain with nan, of an arm that diverged, makes it inconclusive.

    Two questions open a verdict: is the mean gain over widths other than 0, and is that at the largest width? Their smaller p
    counts twice, and Holm's method keeps all techniques together to LEVEL. What follows asks about those that passed alone.
    """
    fits = [_line(own, widths) for own in gains]
    raw = [min(1.0, 2 * min(mean.p, own[-1].p)) if _usable(own) else 1.0 for own, (mean, _, _) in zip(gains, fits)]
    each = LEVEL / max(1, len(names) * len(widths))
    return [
        Finding(
            name,
            tuple(own),
            mean,
            slope,
            p,
            tuple(gain.reach(each) if gain.freedom else math.nan for gain in own),
            _verdict(own, fit) if p <= LEVEL else Verdict.INCONCLUSIVE,
        )
        for name, own, fit, p in zip(names, gains, fits, holm(raw), strict=True)
        for mean, slope, _ in [fit]
    ]


def _usable(gains: Sequence[Estimated]) -> bool:
    return all(math.isfinite(gain.value) and gain.freedom > 0 for gain in gains)


def _line(gains: Sequence[Estimated], widths: Sequence[int]) -> tuple[Estimated, Estimated, Estimated]:
    """Mean, slope per doubling, and fitted gain at the last width less RETAINED of that at the first."""
    if not _usable(gains):
        return (Estimated(math.nan, math.nan, 0.0),) * 3
    x = np.log2(np.asarray(widths, dtype=float))
    x, count = x - x.mean(), len(x)
    mean = np.full(count, 1 / count)
    slope = x / (x @ x) if count > 1 else np.zeros(count)
    kept = (mean + x[-1] * slope) - RETAINED * (mean + x[0] * slope)
    return combined(gains, mean), combined(gains, slope), combined(gains, kept)


def combined(gains: Sequence[Estimated], weights: Array) -> Estimated:
    """A weighted sum of independent estimates; degrees of freedom by Welch and Satterthwaite."""
    parts = [(weight**2 * gain.variance, gain.freedom) for weight, gain in zip(weights, gains)]
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / freedom for part, freedom in parts)
    value = sum(weight * gain.value for weight, gain in zip(weights, gains))
    return Estimated(float(value), float(variance), float(variance**2 / spread) if spread else math.inf)


def _verdict(gains: Sequence[Estimated], fit: tuple[Estimated, Estimated, Estimated]) -> Verdict:
    """Of a technique that has some effect."""
    (mean, slope, kept), last = fit, gains[-1]
    if last.value < 0 and (2 * last.p <= LEVEL or mean.value < 0):
        return Verdict.HURTS
    if abs(slope.value) > slope.reach(LEVEL) and len(gains) > 1:
        return Verdict.GROWS if slope.value > 0 else Verdict.FADES
    if mean.value > 0 and kept.value > kept.reach(2 * LEVEL) and len(gains) > 1:
        return Verdict.HOLDS
    return Verdict.INCONCLUSIVE


def holm(p: Sequence[float]) -> list[float]:
    """Probabilities adjusted by Holm's method, in their order."""
    order, worst, adjusted = sorted(range(len(p)), key=lambda i: p[i]), 0.0, [1.0] * len(p)
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def steps_to(curve: Sequence[float], target: float, over: int) -> float:
    """Steps until the mean training loss of the last `over` steps is `target`, between steps too; nan if it never is."""
    if len(curve) < over:
        return math.nan
    means = np.convolve(np.asarray(curve, dtype=float), np.full(over, 1 / over), mode="valid")
    reached = np.flatnonzero(means <= target)
    if not len(reached):
        return math.nan
    at = reached[0]
    part = (means[at - 1] - target) / (means[at - 1] - means[at]) if at else 1.0
    return float(at + over - 1 + part)


# Distributions, so that there is no dependence on a library for three numbers


def student_tail(t: float, freedom: float) -> float:
    """Probability that Student's t with these degrees of freedom is above t >= 0."""
    if math.isinf(freedom):
        return math.erfc(t / math.sqrt(2)) / 2
    return incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5) / 2


def fisher_tail(f: float, above: float, below: float) -> float:
    """Probability that Fisher's F with these degrees of freedom is above f."""
    return incomplete_beta(below / (below + above * f), below / 2, above / 2)


@functools.lru_cache(maxsize=4096)
def student_quantile(probability: float, freedom: float) -> float:
    """The t that is above Student's with this probability, above one half."""
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > 1 - probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > 1 - probability else (low, middle)
    return high


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function, by its continued fraction."""
    if x <= 0 or x >= 1:
        return min(1.0, max(0.0, x))
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    fraction: Any = 1.0
    for m in range(200, 0, -1):  # from its end
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        fraction = 1 + odd / (1 + even / fraction)
    return front / (a * fraction)
