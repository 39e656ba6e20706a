"""One surface over several sizes: where the best value of a hyperparameter lies, and the loss there.

    surface = fit_surface(points, ["width", "n_layer", "tokens"])
    print(surface.summary())                                              # exponents, and a verdict for each axis
    print(surface.predict({"width": 1024, "n_layer": 24, "tokens": 2**31}))

At each place (width 64 with 6 layers, say) the estimator of one axis finds the optimum and its noise. A plane through these,
    log2 best value = h + sum over axes of drift * log2(size / base),
gives the drifts by weighted least squares; with one axis they are those of `measure_transfer`. The loss at the optima
follows a law with an exponent for each axis (`law`). Both take priors: exponents that were measured elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from speedrun_mup.files import printable
from speedrun_mup.transfer.axes import RATE, Axes
from speedrun_mup.transfer.claims import refuse_copies
from speedrun_mup.transfer.drift import judged
from speedrun_mup.transfer.fits import (
    Estimate,
    LossTable,
    Noise,
    build_loss_table,
    fit_size,
    optima,
    propagate,
)
from speedrun_mup.transfer.law import ANY_EXPONENT, Prior, fit_law
from speedrun_mup.transfer.measure import HUGE, beyond_any_start
from speedrun_mup.transfer.places import base_of, by_place, refuse_undecidable
from speedrun_mup.transfer.plane import fit_plane
from speedrun_mup.transfer.points import TransferError
from speedrun_mup.transfer.surface_results import AxisDrift, Optima, Surface
from speedrun_mup.transfer.table import Table, points_in
from speedrun_mup.transfer.thresholds import Thresholds, Verdict, worst


@dataclass(frozen=True)
class Known:
    """What is known of the axes before the runs, each by an axis's name.

    Args:
        predicted: The drift that the rule in force gives it, log2 per doubling; default 0.
        priors: On its drift.
        loss_priors: On its exponent in the loss; where none is given, nearly anything is possible.
        noise: Standard deviation of the loss between seeds, relative to the loss, and the degrees of freedom it counts for.
        follow: Axes without a rule: forecasts follow their drift even where it may be what is predicted.
    """

    predicted: Mapping[str, float] = field(default_factory=dict)
    priors: Mapping[str, Prior] = field(default_factory=dict)
    loss_priors: Mapping[str, Prior] = field(default_factory=dict)
    noise: tuple[float, float] | None = None
    follow: frozenset[str] = frozenset()

    def check(self, names: Sequence[str]) -> None:
        """Raises TransferError for what is about none of the sizes `names`."""
        for what, some in (("predicted drift", self.predicted), ("prior", {**self.priors, **self.loss_priors})):
            if unknown := sorted(set(some) - set(names)):
                raise TransferError(
                    f"{what} of {printable(unknown[0], 60)}: no such size here; there are {', '.join(names)}"
                )


def fit_surface(
    runs: Table,
    sizes: Sequence[str],
    *,
    hyperparameter: str = RATE,
    arm: str | None = None,
    base: Mapping[str, int] | None = None,
    known: Known | None = None,
    sigma: float | None = None,
    initial_loss: float | None = None,
    thresholds: Thresholds | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Surface:
    """The surface of one arm's runs over several sizes. The same arguments give the same numbers.

    Args:
        runs: The finished runs, each with all of `sizes`: `Point`s; or the path of a CSV, a pandas table, or rows as mappings,
            with columns for the sizes, the hyperparameter and loss, and, if you like, seed and arm.
        sizes: Names of the axes.
        hyperparameter: What was tuned.
        arm: Whose runs; needed where there are several.
        base: Where doublings count from; default: the smallest value of each axis.
        known: Rules in force and exponents measured elsewhere.
        sigma: Standard deviation of the loss between seeds; only where no point was run with two.
        initial_loss: Runs that end at or above it count as diverged.
        thresholds: Every number that decides a verdict.
        resamples: Rows of noise behind each interval.
        seed: Of the resampling.

    Raises:
        TransferError: In one line, for runs that cannot be measured or cannot tell the sizes apart.
    """
    names = list(dict.fromkeys(sizes))
    points = points_in(runs, names, hyperparameter)
    known, thresholds = known or Known(), thresholds or Thresholds()
    arms = {point.arm for point in points}
    if arm is not None and arm not in arms:
        raise TransferError(f"arm {printable(arm, 60)} was not run; there are {', '.join(sorted(arms))}")
    arms, points = (arms, points) if arm is None else ({arm}, [point for point in points if point.arm == arm])
    if len(arms) > 1 or not names:
        raise TransferError(
            f"a surface of {len(arms)} arms; name the one whose runs are meant"
            if names
            else "no sizes: name one or more"
        )
    known.check(names)
    axes, placed = by_place(points, names, hyperparameter)
    refuse_undecidable(names, axes.places)
    limit = beyond_any_start([point.loss for point in points]) if initial_loss is None else initial_loss
    built = {number: build_loss_table(axes, number, some, min(limit, HUGE)) for number, some in placed.items()}
    name, tables = arms.pop(), [table for table in built.values() if isinstance(table, LossTable)]
    refuse_copies({name: tables}, sigma is not None or any(len(table.seeds) > 1 for table in tables), thresholds)
    noise = Noise.of(tables, tables, sigma, thresholds)
    if known.noise:
        noise = noise.steadied(known.noise[0] * float(np.mean([table.mean.min() for table in tables])), known.noise[1])
    fits = [fit_size(name, table, noise, thresholds, resamples, seed) for table in tables]
    trouble = [table for table in built.values() if isinstance(table, str)]
    trouble += [text for fit in fits for text in fit.problems]
    usable, place_of = tuple(fit for fit in fits if not fit.problems), dict(zip(placed, axes.places, strict=True))
    places = tuple(place_of[fit.size] for fit in usable)
    try:
        refuse_undecidable(names, places)
    except TransferError as fault:
        raise TransferError(f"{fault}; places without a best value: {'; '.join(trouble[:4])}") from None
    optima = Optima(name, axes, base_of(names, axes.places, base), places, usable, noise, tuple(trouble))
    return _surface(optima, known, thresholds, seed)


def _surface(found: Optima, known: Known, thresholds: Thresholds, seed: int) -> Surface:
    """Plane, law, and a verdict for each axis, from the optima."""
    names, noise, doublings, (wide, narrow) = found.axes.names, found.noise, found.doublings, optima(found.fits)
    rng = np.random.default_rng([seed, *found.arm.encode()])
    plane = fit_plane(doublings, found.fits, [known.priors.get(name) for name in names], rng)
    priors = [known.loss_priors.get(name, ANY_EXPONENT) for name in names]
    law = fit_law(doublings, found.best, found.error, noise.total_freedom, priors, wide.shape[1], rng)
    drifts, trouble = [], [*found.trouble, *plane.scatter(found.fits, thresholds)]
    for number, name in enumerate(names):
        stream = np.random.default_rng([seed, *found.arm.encode()])
        parts = plane.slopes[number][:, None]
        drift = propagate(parts * wide, found.fits, noise, stream) + plane.beside(plane.slopes[number], number)
        judge = _Judge(
            axes=Axes(name, found.axes.hyperparameter),
            values=tuple(sorted({place[number] for place in found.places})),
            predicted=float(known.predicted.get(name, 0.0)),
            curvature=found.curvature,
            sigma=noise.sigma,
            thresholds=thresholds,
        )
        shift = Estimate((parts * (narrow - wide)).sum(axis=0))
        drifts.append(judge.judged(Estimate(drift), shift, Estimate(law.exponents[:, number]), trouble))
    verdict = worst(axis.verdict for axis in drifts)
    return Surface(found, plane, law, tuple(drifts), verdict, seed, known.follow)


@dataclass(frozen=True)
class _Judge:
    """What one axis is judged by."""

    axes: Axes
    values: tuple[int, ...]
    predicted: float
    curvature: float
    sigma: float | None
    thresholds: Thresholds

    def judged(self, drift: Estimate, shift: Estimate, of_loss: Estimate, trouble: Sequence[str]) -> AxisDrift:
        """The drift with its verdict: what blocks one, else what fails, else what falls short of a pass."""
        off = Estimate(drift.draws - self.predicted)
        span = math.log2(self.values[-1] / self.values[0])
        regret = Estimate(self.curvature * (off.draws * span) ** 2)
        verdict, reasons = self._verdict(off, shift, regret, trouble)
        return AxisDrift(self.axes.size, self.values, drift, self.predicted, regret, of_loss, verdict, tuple(reasons))

    def _verdict(
        self, off: Estimate, shift: Estimate, regret: Estimate, trouble: Sequence[str]
    ) -> tuple[Verdict, list[str]]:
        bounds, values, blocked = self.thresholds, self.values, list(trouble)
        measured = f"drift {off} in log2 per doubling"
        if self.predicted:
            measured += f", beyond the predicted {self.predicted:+g}"
        if len(values) < bounds.min_sizes or values[-1] < bounds.min_span * values[0]:
            need = f"{bounds.min_sizes} {self.axes.plural} that span a factor of {bounds.min_span:g}"
            blocked.append(f"{', '.join(map(str, values))} are too few or too close: needs {need}")
        if math.isnan(off.interval()[0]):
            blocked.append("the noise is unknown: run some points with a second seed, or give its standard deviation")
        if blocked:
            return Verdict.INCONCLUSIVE, [*blocked, measured]
        allowed = bounds.allowed_regret(self.sigma)
        cost = f"regret {regret.value:.4f} nats at {self.axes.at(values[-1])}, allowed {allowed:.4f}"
        return judged(off, shift, regret, allowed, self.axes, bounds, measured, cost)
