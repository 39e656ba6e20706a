"""What was measured, and how it is printed: for a terminal and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from speedrun_mup.files import strict_json
from speedrun_mup.transfer.axes import Axes
from speedrun_mup.transfer.claims import Doubt
from speedrun_mup.transfer.fits import Estimate, Noise, SizeFit, student_t
from speedrun_mup.transfer.larger import LargerIsBetter
from speedrun_mup.transfer.points import value_text
from speedrun_mup.transfer.thresholds import Thresholds, Verdict


@dataclass(frozen=True, eq=False)
class ArmResult:
    """One parametrization over all sizes, ascending in fits.

    drift: log2 per doubling; None without two usable sizes. window_shift: how much it changes when the fits
    see the narrow window only. regret: nats lost at the largest usable size by using the base size's optimum there;
    None if that has none. predicted: the drift that a control is built to have; None for an arm under test.
    """

    arm: str
    axes: Axes
    base_size: int
    fits: tuple[SizeFit, ...]
    drift: Estimate | None
    window_shift: Estimate | None
    regret: Estimate | None
    noise: Noise
    predicted: float | None
    larger: LargerIsBetter | None
    verdict: Verdict
    reasons: tuple[str, ...]

    @property
    def usable(self) -> tuple[SizeFit, ...]:
        """The sizes with a resolved optimum."""
        return tuple(fit for fit in self.fits if not fit.problems)

    def best_loss(self, fit: SizeFit) -> Estimate:
        """Loss at the optimum of one size, the mean over its seeds.

        Resampled seeds would not do for its interval: two can agree by luck. So it is that of this size's noise, steadied
        by the arm's, with Student's t; as if the optimum were one point of the grid.
        """
        value, noise = fit.best_losses[:1], self.noise
        if noise.sigma is None or fit.sigma is None:
            return Estimate(value)
        rng = np.random.default_rng([fit.size, *self.arm.encode()])
        error = noise.total_at(fit.size) / math.sqrt(len(fit.table.losses))
        draws = value + error * rng.standard_normal(len(fit.means) - 1)
        return Estimate(student_t(np.concatenate([value, draws]), noise.total_freedom, rng))


@dataclass(frozen=True, eq=False)
class TransferResult:
    """All arms and the verdict over them, with reasons.

    doubts: why the runs may not be what they claim; any of them makes the verdict INCONCLUSIVE, and is among the reasons.
    notes: what else there is to know of the runs, such as columns of the table that were not used.
    """

    axes: Axes
    arms: dict[str, ArmResult]
    verdict: Verdict
    reasons: tuple[str, ...]
    thresholds: Thresholds
    doubts: tuple[Doubt, ...] = ()
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """A table for a terminal, at most 100 columns wide but for the reasons."""
        return "\n".join(_summary_lines(self))

    def to_json(self, forecasts: Mapping[str, Mapping[str, Any] | str] | None = None) -> str:
        """Everything but the resamples as strict JSON; what is not a finite number is null.

        forecasts: by arm, as `Forecast.to_dict` gives them, or why there is none. se is half the central 68 % interval.
        """
        told = _as_dict(self)
        if forecasts is not None:
            told["forecasts"] = forecasts
        return strict_json(told, indent=1)


def _summary_lines(result: TransferResult) -> Iterator[str]:
    axes = result.axes
    lr = f" {axes.short}" if axes.is_rate else ""
    names = (axes.size, "seeds", "points", f"best log2{lr}", f"best{lr}", "curvature", "loss")
    header = "{:>8} {:>5} {:>6} {:>15} {:>9} {:>9} {:>8}  stable".format(*names)
    for arm in result.arms.values():
        role = "" if arm.predicted is None else f"  (control, predicted drift {arm.predicted:+g})"
        yield f"arm {arm.arm}{role}" + ("" if lr else f", hyperparameter {axes.hyperparameter}")
        yield header
        for fit in arm.fits:
            error = "" if math.isnan(fit.optimum_se) else f" +- {fit.optimum_se:.2f}"
            position = f"{fit.optimum:+.2f}{error}" + ("!" if fit.problems else " ")
            first = f", not {value_text(fit.table.diverged[0])}" if fit.table.diverged else " (end)"
            stable = "nothing" if math.isnan(fit.largest_stable) else value_text(fit.largest_stable)
            yield (
                f"{fit.size:>8} {len(fit.table.losses):>5} {len(fit.table.log2_value):>6} {position:>15}"
                f" {2**fit.optimum:>9.4g} {fit.curvature:>9.4f} {fit.best_losses[0]:>8.4f}"
                f"  to {stable}{first}"
            )
        yield f"  {arm.verdict}"
        yield from (f"  - {text}" for text in arm.reasons)
        if arm.larger:
            yield f"  - {arm.larger}"
        yield ""
    yield f"verdict: {result.verdict}"
    yield from (f"- {text}" for text in result.reasons)
    yield from (f"note: {text}" for text in result.notes)


def _as_dict(result: TransferResult) -> dict[str, Any]:
    return {
        "verdict": result.verdict,
        "reasons": result.reasons,
        "doubts": [asdict(doubt) for doubt in result.doubts],
        "notes": result.notes,
        "thresholds": asdict(result.thresholds),
        "axes": asdict(result.axes),
        "arms": {
            name: {
                "verdict": arm.verdict,
                "reasons": arm.reasons,
                "predicted_drift": arm.predicted,
                "base_size": arm.base_size,
                "drift": numbers(arm.drift),
                "window_shift": numbers(arm.window_shift),
                "regret": numbers(arm.regret),
                "sigma": arm.noise.sigma,
                "seed_sd": arm.noise.total,
                "larger_is_better": arm.larger and asdict(arm.larger),
                "sizes": [
                    {
                        "size": fit.size,
                        "log2_value": fit.table.log2_value.tolist(),
                        "mean_loss": fit.table.mean.tolist(),
                        "runs": fit.table.runs.tolist(),
                        "diverged_log2_value": fit.table.diverged,
                        "largest_stable_log2_value": fit.largest_stable,
                        "optimum_log2_value": fit.optimum,
                        "optimum_se": fit.optimum_se,
                        "best_loss": numbers(arm.best_loss(fit)),
                        "curvature": fit.curvature,
                        "sigma": fit.sigma,
                        "problems": fit.problems,
                    }
                    for fit in arm.fits
                ],
            }
            for name, arm in result.arms.items()
        },
    }


def numbers(estimate: Estimate | None) -> dict[str, Any] | None:
    """An estimate for JSON; se is half the central 68 % interval."""
    if estimate is None:
        return None
    low, high = estimate.interval(0.6827)  # Student's t with few degrees of freedom has no standard deviation
    intervals = {"interval_90": estimate.interval(0.9), "interval_95": estimate.interval(0.95)}
    return {"value": estimate.value, "se": (high - low) / 2, **intervals}
