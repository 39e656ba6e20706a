"""What a large run will do at the best value of its hyperparameter, from the small ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from speedrun_mup.transfer.axes import Axes
from speedrun_mup.transfer.fits import Array, Estimate, optima, propagate, slope_weights, student_t, variances
from speedrun_mup.transfer.points import TransferError
from speedrun_mup.transfer.published import Published
from speedrun_mup.transfer.results import ArmResult, numbers
from speedrun_mup.transfer.thresholds import Verdict


@dataclass(frozen=True, eq=False)
class Forecast:
    """What to expect of one run of `size`, at its best value of the hyperparameter, everything else as in the sweep.

    loss: with the scatter of that one run. log2_value: what to use. exponent: of the size in the excess loss.
    """

    axes: Axes
    size: int
    loss: Estimate
    log2_value: Estimate
    exponent: Estimate
    method: str

    def to_dict(self) -> dict[str, Any]:
        """What JSON has of it."""
        found = {"loss": numbers(self.loss), "log2_value": numbers(self.log2_value)}
        return {"size": self.size, **found, "method": self.method}

    def __str__(self) -> str:
        return self.told(self.axes.short)

    def told(self, name: str, unit: float = 1.0) -> str:
        """For a terminal: the value as `name`, in multiples of 1 / `unit`."""
        loss, low, high = (f"{value:.4f}" for value in (self.loss.value, *self.loss.interval()))
        value, low_value, high_value = (
            f"{unit * 2**at:.4g}" for at in (self.log2_value.value, *self.log2_value.interval())
        )
        ranges = (
            [f" (90 % {low} to {high})", f" (90 % {low_value} to {high_value})"]
            if len(self.loss.draws) > 1
            else ["", ""]
        )
        return f"{self.axes.at(self.size)}: loss {loss}{ranges[0]}, {name} {value}{ranges[1]}; {self.method}"


def loss_forecast(arm: ArmResult, size: int, seed: int = 0, known: Published | None = None) -> Forecast:
    """Loss and best value of the hyperparameter at `size`, from the sizes of one arm.

    The law is loss(w) = a + b w**-p, fitted by least squares with every size counting the same: how far the law holds,
    and not seed noise, is what separates sizes. Four sizes determine p, which is searched from 0 (loss linear in
    log w) to 1.5. Two or three do not, and then a guess decides: log w falls indefinitely where 1/w is flat. So p = 1/2
    gives the number, and every resample draws p between 0 and 1, a quarter of them either end, so that the interval holds
    what lies there too. That spans what is published: from small powers of the parameter count (Kaplan et al., arXiv
    2001.08361) to the 1/w of a model near its infinite-width limit (Vyas et al., arXiv 2305.18411). The interval
    therefore grows with ignorance of the law.

    What is `known` of the recipe from other sweeps counts as well: a prior on the exponent takes the place of that guess, and
    the noise between seeds is steadied by theirs. One pair of seeds leaves it so uncertain that the interval is two to five
    times as wide as the noise alone would make it.

    The value is the mean of the optima, unless their drift is shown to be there (its 90 % interval leaves out
    zero): then that is followed out to `size`, however small, for a PASS allows a little. Its interval holds what the
    drift may be. Optima are those of the narrow window here: loss curves are steeper on the right, which shifts those of
    the wide one to the left, alike at every size; the drift does not mind, their mean does. All intervals are as wide as
    so few seeds demand (`student_t`). Raises TransferError with fewer than two usable sizes, and for a size below all of
    them, where the law goes to infinity.
    """
    axes, fits = arm.axes, arm.usable
    if len(fits) < 2 or arm.drift is None:
        why = "".join(f"; {text}" for fit in arm.fits for text in fit.problems)
        raise TransferError(
            f"arm {arm.arm}: a forecast needs two {axes.plural} with an optimum, it has {len(fits)}{why}"
        )
    if size < fits[0].size:
        raise TransferError(
            f"{axes.at(size)} is below the smallest measured, {fits[0].size}; ask for one at or above it"
        )
    rng = np.random.default_rng([seed, size, *arm.arm.encode()])
    losses = np.array([fit.best_losses for fit in fits]).T  # (R, W)
    doublings, at = np.log2([fit.size / fits[-1].size for fit in fits]), math.log2(size / fits[-1].size)
    rows, letter, noise = len(losses), axes.size[0], arm.noise
    if known and rows > 1:
        noise = noise.steadied(known.noise * float(losses[0].mean()), known.freedom)
        errors = np.array([noise.total_at(fit.size) / math.sqrt(len(fit.table.losses)) for fit in fits])
        losses[1:] = losses[0] + errors * rng.standard_normal((rows - 1, len(fits)))
    prior = known.exponents.get(axes.size) if known else None
    drawn = np.full(rows, prior.mean) if prior else np.zeros(0)
    if prior:
        drawn[1:] += prior.sd * rng.standard_normal(rows - 1)
    if len(fits) >= 4:
        grid = np.linspace(0, 1.5, 61)
        misses = np.array([_power_law(doublings, losses, np.full(rows, p), 0.0)[1] for p in grid])
        if prior and rows > 1:
            error = float(np.mean([noise.total_at(fit.size) ** 2 / len(fit.table.losses) for fit in fits]))
            misses += error * ((grid[:, None] - drawn) / prior.sd) ** 2
        exponent = grid[misses.argmin(axis=0)]
        law = f"a + b {letter}^-{exponent[0]:.2f}" if exponent[0] >= 0.005 else f"a straight line in log {axes.size}"
        law += f" through {len(fits)} {axes.plural}"
    elif prior:
        exponent = drawn.clip(0, 1.5)
        law = (
            f"a + b {letter}^-p through {len(fits)} {axes.plural}, p {prior.mean:g} +- {prior.sd:g} from earlier sweeps"
        )
    else:
        exponent = np.concatenate([[0.5], rng.uniform(-0.5, 1.5, rows - 1).clip(0, 1)])
        law = f"a + b {letter}^-p through {len(fits)} {axes.plural}, p between 0 and 1 unknown"
    by_law, _ = _power_law(doublings, np.tile(losses[0], (rows, 1)), exponent, at)
    loss, _ = _power_law(doublings, losses, exponent, at)
    by_seed = loss - by_law
    by_seed[1:] += noise.total * rng.standard_normal(rows - 1)
    freedom = noise.total_freedom if known else _freedom(arm, doublings, losses, exponent[:1], at)
    loss = by_law + student_t(by_seed, freedom, rng)

    weights = np.array([fit.weight for fit in fits])
    shares = weights / weights.sum()
    away = math.log2(size) - float(shares @ np.log2([fit.size for fit in fits]))
    wide, narrow = optima(fits)
    value = propagate(shares[:, None] * narrow + away * slope_weights(fits) * wide, fits, arm.noise, rng)
    low, high = arm.drift.interval()
    if low > 0 or high < 0:
        advice = f"following a drift of {arm.drift.value:+.2f} in log2 per doubling"
    else:  # an unknown interval shows nothing
        value[0] -= away * arm.drift.value
        advice = "mean of the optima; no drift is shown" + ("" if arm.verdict is Verdict.PASS else ", nor ruled out")
    method = f"loss from {law}; {'rate' if axes.is_rate else axes.hyperparameter}: {advice}"
    return Forecast(axes, size, Estimate(loss), Estimate(value), Estimate(exponent), method)


def _freedom(arm: ArmResult, doublings: Array, losses: Array, exponent: Array, at: float) -> float:
    """Degrees of freedom behind the scatter of the forecast loss: that of the fitted law, and that of the run itself.

    Both come from the same seeds. Satterthwaite's rule would take them for independent, and find up to twice as many; so
    their uncertainties are added as they are, which is exact where all sizes have the same seeds and noise.
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
