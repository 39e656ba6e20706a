"""What a surface says: the drift on each axis with its verdict, and forecasts anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from speedrun_mup.transfer.axes import told_sizes
from speedrun_mup.transfer.fits import Array, Estimate, Noise, SizeFit, optima, propagate
from speedrun_mup.transfer.law import LossLaw
from speedrun_mup.transfer.places import Place, Places, check_size, outside
from speedrun_mup.transfer.plane import Plane
from speedrun_mup.transfer.points import TransferError
from speedrun_mup.transfer.results import numbers
from speedrun_mup.transfer.thresholds import Verdict


@dataclass(frozen=True, eq=False)
class AxisDrift:
    """What one size does to the optimum, the other sizes being equal.

    Args:
        name: Of the size.
        values: That were run, ascending.
        drift: log2 of the best value per doubling.
        predicted: What the rule in force says of it; 0: the same value is best everywhere.
        regret: Nats lost at the largest value by following the rule from the smallest.
        loss_exponent: Of this size in the loss.
        verdict: On drift against predicted.
        reasons: For the verdict.
    """

    name: str
    values: tuple[int, ...]
    drift: Estimate
    predicted: float
    regret: Estimate
    loss_exponent: Estimate
    verdict: Verdict
    reasons: tuple[str, ...]

    @property
    def is_off(self) -> bool:
        """Whether the drift is shown to differ from the rule's, be it ever so little."""
        low, high = self.drift.interval()
        return low > self.predicted or high < self.predicted


@dataclass(frozen=True, eq=False)
class SurfaceForecast:
    """What to expect of one run at `sizes`, with its best value.

    Args:
        sizes: Of the run.
        log2_value: What to use.
        loss: With the scatter of that one run.
        regret: Nats that the predicted value may cost above the best one.
        outside: How far beyond what was run, in doublings for each axis.
        advice: What the value follows.
    """

    sizes: dict[str, int]
    log2_value: Estimate
    loss: Estimate
    regret: Estimate
    outside: dict[str, float]
    advice: str

    @property
    def distance(self) -> str:
        """How far outside the runs it lies, for a reader."""
        told = [
            f"{name} by {abs(far):.2g} {'above' if far > 0 else 'below'}" for name, far in self.outside.items() if far
        ]
        return f"outside the runs, in doublings: {', '.join(told)}" if told else "inside the runs on every axis"

    def __str__(self) -> str:
        (low, high), (small, large) = self.loss.interval(), self.log2_value.interval()
        known = len(self.loss.draws) > 1
        ranges = (
            (f" (90 % {low:.4f} to {high:.4f})", f" (90 % {2**small:.4g} to {2**large:.4g})") if known else ("", "")
        )
        value = f"best value {2**self.log2_value.value:.4g}{ranges[1]}"
        return (
            f"{told_sizes(self.sizes)}: loss {self.loss.value:.4f}{ranges[0]}, {value}; {self.advice}; {self.distance}"
        )

    def to_dict(self) -> dict[str, object]:
        """What JSON has of it."""
        estimates = {name: numbers(getattr(self, name)) for name in ("log2_value", "loss", "regret")}
        return {"sizes": self.sizes, **estimates, "doublings_outside": self.outside, "advice": self.advice}


@dataclass(frozen=True, eq=False)
class Optima:
    """The optimum of every place of one arm.

    Args:
        arm: Its name.
        axes: The sizes, and all places that were run.
        base: Where doublings count from.
        places: Those with an optimum, ascending.
        fits: Of these.
        noise: Of the runs.
        trouble: A sentence for every place without one.
    """

    arm: str
    axes: Places
    base: dict[str, int]
    places: tuple[Place, ...]
    fits: tuple[SizeFit, ...]
    noise: Noise
    trouble: tuple[str, ...]

    @property
    def doublings(self) -> Array:
        """Log2 of the places over the base, (P, K)."""
        return np.log2(np.array(self.places, dtype=float)) - np.log2([float(size) for size in self.base.values()])

    @property
    def best(self) -> Array:
        """Loss at the optima, (P,)."""
        return np.array([fit.best_losses[0] for fit in self.fits])

    @property
    def error(self) -> Array:
        """Standard errors of `best`, from the noise between seeds; nan where that is unknown."""
        seeds = np.sqrt([len(fit.table.losses) for fit in self.fits])
        known = self.noise.sigma is not None
        return np.array([self.noise.total_at(fit.size) if known else math.nan for fit in self.fits]) / seeds

    @property
    def curvature(self) -> float:
        """Weighted mean over the places, nats per log2 squared."""
        return float(np.average([fit.curvature for fit in self.fits], weights=[fit.weight for fit in self.fits]))


@dataclass(frozen=True, eq=False)
class Surface:
    """The fitted surface of one arm: plane and law through its optima, and a verdict for each axis. follow: see `Known`."""

    optima: Optima
    plane: Plane
    law: LossLaw
    drifts: tuple[AxisDrift, ...]
    verdict: Verdict
    seed: int
    follow: frozenset[str] = frozenset()

    @property
    def reasons(self) -> tuple[str, ...]:
        """For the verdict; what is said of several axes is said once."""
        first, *others = self.drifts
        shared = [text for text in first.reasons if others and all(text in axis.reasons for axis in others)]
        own = [
            f"{axis.name}: {axis.verdict}, {text}"
            for axis in self.drifts
            for text in axis.reasons
            if text not in shared
        ]
        return (*shared, *own)

    def __getitem__(self, name: str) -> AxisDrift:
        return next(axis for axis in self.drifts if axis.name == name)

    def predict(self, sizes: Mapping[str, int]) -> SurfaceForecast:
        """Best value and loss at `sizes`, one for each axis. Raises TransferError for a missing, unknown or impossible one.

        The value follows the drifts of the axes whose drift is shown to differ from the rule's; on the others the rule, and
        the interval holds what the drift may be. Outside the runs the interval grows with the distance.
        """
        names = self.optima.axes.names
        if wrong := set(sizes) ^ set(names):
            raise TransferError(f"a forecast needs {', '.join(names)}, each once; look at {', '.join(sorted(wrong))}")
        for name in names:
            check_size(name, sizes[name], "forecast of")
        rng = np.random.default_rng([self.seed, *(int(sizes[name]) for name in names)])
        at = np.array([math.log2(sizes[name] / self.optima.base[name]) for name in names])
        plane, (wide, narrow) = self.plane, optima(self.optima.fits)
        away = at - plane.centre
        follow = away @ plane.slopes
        parts = plane.shares[:, None] * narrow + follow[:, None] * wide
        value = propagate(parts, self.optima.fits, self.optima.noise, rng) + away @ plane.of_priors
        value = value + plane.departures @ (plane.shares + follow) + plane.departure
        held = [axis.name for axis in self.drifts if not axis.is_off and axis.name not in self.follow]
        for number, axis in enumerate(self.drifts):
            if axis.name in held:
                value[0] -= away[number] * (axis.drift.value - axis.predicted)
        law = self.law
        loss = law.at(at[None])[:, 0]
        rows = len(loss)
        own = np.hypot(law.misfit, self.optima.noise.total * law.spread) * rng.standard_normal(rows)
        loss[1:] += own[1:]
        regret = self.optima.curvature * (value - value[0]) ** 2
        moved = [axis.name for axis in self.drifts if axis.name not in held]
        advice = f"follows the measured drift on {', '.join(moved)}" if moved else "no drift off the rule is shown"
        told = {name: int(sizes[name]) for name in names}
        return SurfaceForecast(
            told, Estimate(value), Estimate(loss), Estimate(regret), outside(names, self.optima.places, told), advice
        )

    def summary(self) -> str:
        """A table for a terminal, a line for each axis, and the reasons."""
        count = sum(int(fit.table.runs.sum()) for fit in self.optima.fits)
        axes = self.optima.axes
        what = f"{axes.hyperparameter} over {', '.join(axes.names)}"
        lines = [f"arm {self.optima.arm}: {what}; {len(self.optima.fits)} places"]
        lines[0] += f", {count} runs"
        row = "{:<14} {:<24} {:>28} {:>10} {:>26}  {}"
        lines.append(
            row.format("size", "values", "drift per doubling (90 %)", "predicted", "exponent of loss", "verdict")
        )
        for axis in self.drifts:
            values = ", ".join(map(str, axis.values))
            shown = values if len(values) <= 24 else f"{axis.values[0]} ... {axis.values[-1]}"
            drift, exponent = _told(axis.drift, "+.3f"), _told(axis.loss_exponent, ".2f")
            lines.append(row.format(axis.name, shown, drift, f"{axis.predicted:+g}", exponent, axis.verdict).rstrip())
        lines.append(f"verdict: {self.verdict}")
        lines += [f"- {text}" for text in self.reasons]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """What JSON has of it."""
        return {
            "verdict": self.verdict,
            "reasons": self.reasons,
            "hyperparameter": self.optima.axes.hyperparameter,
            "base": self.optima.base,
            "curvature": self.optima.curvature,
            "sizes": {
                axis.name: {
                    "values": axis.values,
                    "drift": numbers(axis.drift),
                    "predicted_drift": axis.predicted,
                    "regret": numbers(axis.regret),
                    "loss_exponent": numbers(axis.loss_exponent),
                    "verdict": axis.verdict,
                    "reasons": axis.reasons,
                }
                for axis in self.drifts
            },
            "places": [
                {
                    "sizes": dict(zip(self.optima.axes.names, place, strict=True)),
                    "optimum_log2_value": fit.optimum,
                    "optimum_se": fit.optimum_se,
                    "best_loss": float(fit.best_losses[0]),
                    "curvature": fit.curvature,
                }
                for place, fit in zip(self.optima.places, self.optima.fits, strict=True)
            ],
        }


def _told(estimate: Estimate, form: str) -> str:
    if len(estimate.draws) == 1:
        return f"{estimate.value:{form}}"
    low, high = estimate.interval()
    return f"{estimate.value:{form}} ({low:{form}} to {high:{form}})"
