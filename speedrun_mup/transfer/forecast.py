"""What a wide run will do at its best learning rate, from the narrow ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from speedrun_mup.transfer.fits import Array, Estimate, drift_line, student_t, summed, variances, vertices
from speedrun_mup.transfer.results import ArmResult
from speedrun_mup.transfer.runs import LR, TransferError, is_rate
from speedrun_mup.transfer.thresholds import Verdict


@dataclass(frozen=True, eq=False)
class Forecast:
    """What to expect of one run at `width`, at its best learning rate, everything else being as in the sweep.

    loss: with the scatter of that one run. log2_lr: the rate to use, or what else `knob` names. exponent: of the width
    in the excess loss.
    """

    width: int
    loss: Estimate
    log2_lr: Estimate
    exponent: Estimate
    method: str
    knob: str = LR

    def __str__(self) -> str:
        return self.told(LR if is_rate(self.knob) else self.knob)

    def told(self, name: str, unit: float = 1.0) -> str:
        """For a terminal: the rate as `name`, in multiples of 1 / `unit`."""
        loss, low, high = (f"{value:.4f}" for value in (self.loss.value, *self.loss.interval()))
        lr, slow, fast = (f"{unit * 2**value:.4g}" for value in (self.log2_lr.value, *self.log2_lr.interval()))
        ranges = [f" (90 % {low} to {high})", f" (90 % {slow} to {fast})"] if len(self.loss.draws) > 1 else ["", ""]
        return f"width {self.width}: loss {loss}{ranges[0]}, {name} {lr}{ranges[1]}; {self.method}"


def loss_forecast(arm: ArmResult, width: int, seed: int = 0) -> Forecast:
    """Loss and best learning rate at `width`, from the widths of one arm.

    The law is loss(w) = a + b w**-p, fitted by least squares with every width counting the same: how far the law holds,
    and not seed noise, is what separates widths. Four widths determine p, which is searched from 0 (loss linear in
    log w) to 1.5. Two or three do not, and then a guess decides: log w falls for ever where 1/w is flat. So p = 1/2
    gives the number, and every resample draws p between 0 and 1, a quarter of them either end, so that the interval holds
    what lies there too. That spans what is published: from small powers of the parameter count (Kaplan et al., arXiv
    2001.08361) to the 1/w of a model near its infinite-width limit (Vyas et al., arXiv 2305.18411). The interval
    therefore grows with ignorance of the law.

    The learning rate is the mean of the optima, unless their drift is shown to be there (its 90 % interval leaves out
    zero): then that is followed out to `width`, however small, for a PASS allows a little. Its interval holds what the
    drift may be. Optima are those of the narrow window here: loss curves are steeper on the right, which shifts those of
    the wide one to the left, alike at every width; the drift does not mind, their mean does. All intervals are as wide as
    so few seeds demand (`student_t`). Raises TransferError with fewer than two usable widths.
    """
    fits = arm.usable
    if len(fits) < 2 or arm.drift is None:
        why = "".join(f"; {text}" for fit in arm.fits for text in fit.problems)
        raise TransferError(f"arm {arm.arm}: a forecast needs two widths with an optimum, it has {len(fits)}{why}")
    rng = np.random.default_rng([seed, width, *arm.arm.encode()])
    losses = np.array([fit.best_losses for fit in fits]).T  # (R, W)
    doublings, at = np.log2([fit.width / fits[-1].width for fit in fits]), math.log2(width / fits[-1].width)
    rows = len(losses)
    if len(fits) >= 4:
        trials = [_power_law(doublings, losses, np.full(rows, p), 0.0) for p in np.linspace(0, 1.5, 61)]
        best = np.array([rest for _, rest in trials]).argmin(axis=0)
        exponent = np.linspace(0, 1.5, 61)[best]
        law = f"a + b w^-{exponent[0]:.2f}" if exponent[0] >= 0.005 else "a straight line in log width"
        law += f" through {len(fits)} widths"
    else:
        exponent = np.concatenate([[0.5], rng.uniform(-0.5, 1.5, rows - 1).clip(0, 1)])
        law = f"a + b w^-p through {len(fits)} widths, p between 0 and 1 unknown"
    by_law, _ = _power_law(doublings, np.tile(losses[0], (rows, 1)), exponent, at)
    loss, _ = _power_law(doublings, losses, exponent, at)
    by_seed = loss - by_law
    by_seed[1:] += arm.noise.total * rng.standard_normal(rows - 1)
    loss = by_law + student_t(by_seed, _freedom(arm, doublings, losses, exponent[:1], at), rng)

    weights = np.array([fit.weight for fit in fits])
    shares = weights / weights.sum()
    away = math.log2(width) - float(shares @ np.log2([fit.width for fit in fits]))
    optima, narrow = vertices(fits)
    rate = summed(shares[:, None] * narrow + away * drift_line(fits) * optima, fits, arm.noise, rng)
    low, high = arm.drift.interval()
    if low > 0 or high < 0:
        advice = f"following a drift of {arm.drift.value:+.2f} octave per doubling"
    else:  # an unknown interval shows nothing
        rate[0] -= away * arm.drift.value
        advice = "mean of the optima; no drift is shown" + ("" if arm.verdict is Verdict.PASS else ", nor ruled out")
    method = f"loss from {law}; {'rate' if is_rate(arm.knob) else arm.knob}: {advice}"
    return Forecast(width, Estimate(loss), Estimate(rate), Estimate(exponent), method, arm.knob)


def _freedom(arm: ArmResult, doublings: Array, losses: Array, exponent: Array, at: float) -> float:
    """Degrees of freedom behind the scatter of the forecast loss: that of the fitted law, and that of the run itself.

    Both come from the same seeds. Satterthwaite's rule would take them for independent, and find up to twice as many; so
    their uncertainties are added as they are, which is exact where all widths have the same seeds and noise.
    """
    weigh = np.eye(len(doublings))
    line, _ = _power_law(doublings, weigh, np.repeat(exponent, len(weigh)), at)
    freedom = arm.noise.total_freedom
    fitted, term = variances(line[:, None] * losses.T, arm.usable, freedom)
    own = arm.noise.total**2
    uncertainty = (math.sqrt(term) + own / math.sqrt(freedom)) ** 2
    return (fitted + own) ** 2 / uncertainty if uncertainty else math.inf


def _power_law(doublings: Array, losses: Array, exponent: Array, at: float) -> tuple[Array, Array]:
    """Rows of `losses` (R, W) fitted by a + b basis(doublings), p = `exponent` (R,): value `at`, sum of squares; (R,).

    The basis (2**(-p j) - 1) / p becomes -j ln 2 at p = 0, so the exponents form one family.
    """

    def basis(j: Array) -> Array:  # (R, len(j))
        p = np.maximum(exponent, 1e-9)[:, None]
        return np.expm1(-p * j * math.log(2)) / p

    x, target = basis(doublings), basis(np.array([at]))[:, 0]
    mean = x.mean(axis=1, keepdims=True)
    slope = ((x - mean) * losses).sum(axis=1) / ((x - mean) ** 2).sum(axis=1)
    level = losses.mean(axis=1)
    rest = losses - level[:, None] - slope[:, None] * (x - mean)
    return level + slope * (target - mean[:, 0]), (rest**2).sum(axis=1)
