"""The loss at the best value of the hyperparameter as a law of several sizes, with priors on its exponents.

Along one axis, j doublings above the base, the loss changes by c(j) = b (2**(-p j) - 1) / p: a power law of that axis, a
straight line in log size at p = 0. The axes together give

    L = a + (product over axes of (1 + t c) - 1) / t

so that t = 0 adds the axes' effects (Hoffmann et al., arXiv 2203.15556) and t = 1 / (a - E) multiplies their powers above a
floor E. Exponents p and coupling t have priors, for few sizes do not determine them; levels a and slopes b are free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speedrun_mup.transfer.fits import Array


@dataclass(frozen=True)
class Prior:
    """What is known of a number before the runs: a normal distribution."""

    mean: float
    sd: float


# Exponents of the loss in one size: from next to nothing (Kaplan et al., arXiv 2001.08361, in parameters) to the 1 / width of
# a model near its infinite-width limit (Vyas et al., arXiv 2305.18411).
ANY_EXPONENT = Prior(0.5, 0.4)
COUPLING = Prior(0.75, 0.5)  # t in units of 1 / loss at the base: 0 adds, 1 multiplies above a floor of 0
EXPONENTS, COUPLINGS = (-0.5, 2.0), (1e-3, 1.6)  # what is believed at all
STEPS = 30  # of the minimisation
FLAT = 1e-4  # exponents nearer to 0 than this are a straight line in log size
# A law of the loss is hardly ever off by nothing, and few places to spare show so little of it that Student's t would have
# the interval: as if so many further places had shown so much of the loss.
USUAL_MISFIT, MISFIT_FREEDOM = 0.001, 3.0
UNKNOWN_NOISE = 0.003  # of the loss: what it is taken for where it is unknown


@dataclass(frozen=True, eq=False)
class LossLaw:
    """A fitted law, the data's in row 0 and draws of what noise and priors allow in rows 1 to R - 1.

    Args:
        values: (R, 2 K + 2): a, K slopes b, K exponents p, t.
        misfit: Standard deviation of places about the law beyond their noise, nats, (R,).
        spread: Of the noise in each row, relative to its estimate, which few seeds leave uncertain, (R,).
    """

    values: Array
    misfit: Array
    spread: Array

    @property
    def exponents(self) -> Array:
        """(R, K)."""
        count = (self.values.shape[1] - 2) // 2
        return self.values[:, 1 + count : 1 + 2 * count]

    def at(self, doublings: Array) -> Array:
        """Loss (R, N) at places (N, K), doublings above the base."""
        return law_at(self.values, doublings)


def law_at(values: Array, doublings: Array) -> Array:
    """The law of the module's head: (R, 2 K + 2) numbers at (N, K) places give (R, N) losses."""
    count = doublings.shape[1]
    slopes, exponents = values[:, None, 1 : 1 + count], values[:, None, 1 + count : 1 + 2 * count]
    safe = np.where(np.abs(exponents) < FLAT, FLAT, exponents)
    effects = slopes * np.expm1(-safe * doublings * math.log(2)) / safe
    coupling = values[:, -1:]
    return values[:, :1] + (np.maximum(1 + coupling[:, :, None] * effects, 0.0).prod(axis=2) - 1) / coupling


def fit_law(
    doublings: Array,
    losses: Array,
    error: Array,
    freedom: float,
    exponents: Sequence[Prior],
    rows: int,
    rng: np.random.Generator,
) -> LossLaw:
    """The law through one loss per place.

    Row 0 is the most probable law. Every other row is that of losses and priors that are drawn again around their values,
    which samples what is probable (randomised maximum likelihood: Chen and Oliver 2012): exactly where the law is linear.

    Args:
        doublings: (P, K) of the places, above the base.
        losses: (P,), best of each place.
        error: (P,) their standard errors; nan where noise is unknown.
        freedom: Degrees of freedom behind the errors; each row draws a scale of the noise that fits them.
        exponents: K priors.
        rows: R.
        rng: Of the draws.
    """
    count, (places,) = doublings.shape[1], losses.shape
    scale = float(np.abs(losses).max())
    error = np.where(np.isfinite(error), error, UNKNOWN_NOISE * scale)
    centre = np.array([0.0] * (1 + count) + [prior.mean for prior in exponents] + [COUPLING.mean / scale])
    width = np.array([np.inf] * (1 + count) + [prior.sd for prior in exponents] + [COUPLING.sd / scale])
    one = np.ones((1, places))
    best = _most_probable(doublings, losses[None], error * one, centre[None], width, scale)
    misfit, spare = _misfit(best, doublings, losses, error, width)
    spread, departures = _scales(freedom, rows, rng), misfit * _scales(spare, rows, rng)
    noise = np.sqrt((error * spread[:, None]) ** 2 + departures[:, None] ** 2)
    draws = losses + noise * rng.standard_normal((rows, places))
    known = np.where(np.isfinite(width), width, 0.0)
    priors = centre + known * rng.standard_normal((rows, len(centre)))
    draws[0], priors[0] = losses, centre
    values = _most_probable(doublings, draws, noise, priors, width, scale)
    return LossLaw(values, departures, spread)


def _scales(freedom: float, rows: int, rng: np.random.Generator) -> Array:
    """Draws (R,) of a standard deviation over its estimate; 1 in row 0."""
    if not math.isfinite(freedom):
        return np.ones(rows)
    scales = np.sqrt(freedom / rng.chisquare(freedom, rows))
    scales[0] = 1.0
    return scales


def _most_probable(doublings: Array, losses: Array, error: Array, centre: Array, width: Array, scale: float) -> Array:
    """Least squares of losses and priors, each row by itself: (R, 2 K + 2), by damped Gauss-Newton steps.

    losses, error: (R, P). centre: (R, 2 K + 2) of the priors; width: (2 K + 2,) of them, inf for what has none.
    """
    count = doublings.shape[1]
    low = np.array([-np.inf] * (1 + count) + [EXPONENTS[0]] * count + [COUPLINGS[0] / scale])
    high = np.array([np.inf] * (1 + count) + [EXPONENTS[1]] * count + [COUPLINGS[1] / scale])

    def cost(values: Array) -> tuple[Array, Array]:
        rest = (law_at(values, doublings) - losses) / error
        return rest, (rest**2).sum(axis=1) + (((values - centre) / width) ** 2).sum(axis=1)

    values = np.clip(_start(doublings, losses, centre), low, high)
    rest, now = cost(values)
    damping = np.full(len(values), 1e-3)
    for _ in range(STEPS):
        slope = law_derivatives(values, doublings) / error[:, :, None]
        normal = np.einsum("rpi,rpj->rij", slope, slope) + np.diag(width**-2.0)
        gradient = np.einsum("rpi,rp->ri", slope, rest) + (values - centre) / width**2
        diagonal = np.einsum("rii->ri", normal)
        normal = normal + (damping[:, None] * diagonal + 1e-12)[:, :, None] * np.eye(len(width))
        trial = np.clip(values - np.linalg.solve(normal, gradient[:, :, None])[:, :, 0], low, high)
        trial_rest, trial_cost = cost(trial)
        better = trial_cost < now
        done = (np.abs(now - trial_cost) < 1e-6 * (1 + now)).all()
        values, rest = np.where(better[:, None], trial, values), np.where(better[:, None], trial_rest, rest)
        now, damping = np.where(better, trial_cost, now), np.where(better, damping / 5, np.minimum(damping * 4, 1e8))
        if done:
            break
    return values


def _start(doublings: Array, losses: Array, centre: Array) -> Array:
    """Values (R, 2 K + 2) to begin with: exponents and coupling of the priors, the rest by a plane in log sizes."""
    places, count = doublings.shape
    design = np.concatenate([np.ones((places, 1)), -math.log(2) * doublings], axis=1)
    plane = np.linalg.lstsq(design, losses.T, rcond=None)[0].T
    return np.concatenate([plane, centre[:, 1 + count :]], axis=1)


def law_derivatives(values: Array, doublings: Array) -> Array:
    """Of the law by its numbers, (R, 2 K + 2) of them, at places (P, K): (R, P, 2 K + 2)."""
    count = doublings.shape[1]
    slopes, exponents = values[:, None, 1 : 1 + count], values[:, None, 1 + count : 1 + 2 * count]
    coupling = values[:, -1][:, None, None]
    p = np.where(np.abs(exponents) < FLAT, FLAT, exponents)
    x = doublings * math.log(2)
    basis = np.expm1(-p * x) / p
    effects = slopes * basis
    factors = np.maximum(1 + coupling * effects, 1e-12)
    whole = factors.prod(axis=2, keepdims=True)
    others = whole / factors
    by_exponent = others * slopes * (-x * np.exp(-p * x) - basis) / p
    by_coupling = ((others * effects).sum(axis=2, keepdims=True) - (whole - 1) / coupling) / coupling
    return np.concatenate([np.ones_like(whole), others * basis, by_exponent, by_coupling], axis=2)


def _misfit(best: Array, doublings: Array, losses: Array, error: Array, width: Array) -> tuple[float, float]:
    """How far places lie from the law beyond their noise, by the method of moments, steadied by what is usual; and the
    degrees of freedom behind that."""
    slope = law_derivatives(best, doublings)[0] / error[:, None]
    inverse = np.linalg.pinv(slope.T @ slope + np.diag(width**-2.0))
    taken = np.einsum("pi,ij,pj->p", slope, inverse, slope)
    spare = max(len(losses) - float(taken.sum()), 0.0)
    rest = losses - law_at(best, doublings)[0]
    squares = max(float((rest**2).sum() - (error**2 * (1 - taken)).sum()), 0.0) if spare >= 1 else 0.0
    spare = spare if squares else 0.0  # what noise explains says nothing of how small the misfit is
    usual = USUAL_MISFIT * float(np.abs(losses).max())
    freedom = spare + MISFIT_FREEDOM
    return math.sqrt((squares + MISFIT_FREEDOM * usual**2) / freedom), freedom
