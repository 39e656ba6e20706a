"""The plane through the optima of many places: log2 of the best value against log2 of several sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speedrun_mup.transfer.fits import Array, SizeFit
from speedrun_mup.transfer.law import Prior
from speedrun_mup.transfer.thresholds import Thresholds

SPARE = 3  # places beyond those that a plane needs, from which on their scatter about it counts


@dataclass(frozen=True, eq=False)
class Plane:
    """Weighted least squares of the optima on log2 sizes, with priors on the slopes, as coefficients of the optima.

    Args:
        centre: Weighted mean of the places, (K,) doublings above the base.
        shares: Of the places in the level at the centre, (P,).
        slopes: Of the places in the slopes, (K, P).
        of_priors: What the priors add to the slopes, (K, R).
        departures: Of the places from any plane, (R, P), row 0 zero.
        departure: Of another place, (R,), row 0 zero.
        rest: Distances of the optima from the plane, log2, (P,).
    """

    centre: Array
    shares: Array
    slopes: Array
    of_priors: Array
    departures: Array
    departure: Array
    rest: Array

    def beside(self, weights: Array, axis: int) -> Array:
        """What a slope has beside its optima (R,): the prior on it, and departures of places. weights: (P,) of the places."""
        return self.of_priors[axis] + self.departures @ weights

    def scatter(self, fits: Sequence[SizeFit], thresholds: Thresholds) -> list[str]:
        """A sentence for every place far off the plane, so that small slopes would say little."""
        errors = np.nan_to_num([fit.optimum_se for fit in fits])
        far = np.abs(self.rest) > np.maximum(thresholds.max_scatter, 3 * errors)
        pairs = zip(fits, self.rest, far, strict=True)
        return [
            f"{fit.place}: optimum {rest:+.2f} (log2) off the plane through all"
            for fit, rest, is_far in pairs
            if is_far
        ]


def fit_plane(
    doublings: Array, fits: Sequence[SizeFit], priors: Sequence[Prior | None], rng: np.random.Generator
) -> Plane:
    """The plane through the optima of `fits` at places `doublings` (P, K), with a prior on each slope, or none.

    With one axis and no prior its slope has the weights of `slope_weights`.
    """
    at, weights = np.array([fit.optimum for fit in fits]), np.array([fit.weight for fit in fits])
    rows, spare = len(fits[0].means), len(fits) - 1 - len(priors)
    precision = np.array([0.0 if prior is None else prior.sd**-2.0 for prior in priors])
    shares = weights / weights.sum()
    centre = shares @ doublings
    centred = doublings - centre
    inverse = np.linalg.inv((weights[:, None] * centred).T @ centred + np.diag(precision))
    slopes = inverse @ (weights[:, None] * centred).T
    drawn = np.array([[0.0 if prior is None else prior.mean] * rows for prior in priors])
    for number, prior in enumerate(priors):
        if prior is not None:
            drawn[number, 1:] += prior.sd * rng.standard_normal(rows - 1)
    of_priors = (inverse * precision) @ drawn
    rest = at - shares @ at - centred @ (slopes @ at + of_priors[:, 0])
    beyond = _beyond_noise(rest, np.array([fit.optimum_se for fit in fits]), spare)
    departures, departure = np.zeros((rows, len(fits))), np.zeros(rows)
    if beyond:
        scale = beyond * np.sqrt(spare / rng.chisquare(spare, rows - 1))
        departures[1:] = scale[:, None] * rng.standard_normal((rows - 1, len(fits)))
        departure[1:] = scale * rng.standard_normal(rows - 1)
    return Plane(centre, shares, slopes, of_priors, departures, departure, rest)


def _beyond_noise(rest: Array, errors: Array, spare: int) -> float:
    """Standard deviation of optima about the plane that their noise does not explain (DerSimonian and Laird 1986); 0 where
    noise is unknown, or places are too few to show it."""
    if spare < SPARE or not (errors > 0).all():
        return 0.0
    weights = errors**-2.0
    excess = float((weights * rest**2).sum()) - spare
    return math.sqrt(max(excess, 0.0) / float(weights.sum() - (weights**2).sum() / weights.sum()))
