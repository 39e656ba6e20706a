"""What was measured, and how it is told: for a terminal and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from speedrun_mup.transfer.claims import Doubt
from speedrun_mup.transfer.fits import Estimate, Noise, WidthFit, student_t
from speedrun_mup.transfer.runs import LR, is_rate, lr_text
from speedrun_mup.transfer.thresholds import Thresholds, Verdict
from speedrun_mup.transfer.wider import WiderIsBetter

if TYPE_CHECKING:
    from speedrun_mup.transfer.forecast import Forecast


@dataclass(frozen=True, eq=False)
class ArmResult:
    """One parametrization over all widths, ascending in fits.

    drift: octaves per doubling; None without two usable widths. window_shift: how much it changes when the parabolas
    see the narrow window only. regret: nats lost at the widest usable width by using the base width's optimum there;
    None if that has none. predicted: the drift that a control is built to have; None for an arm under test. knob: what
    was turned.
    """

    arm: str
    base_width: int
    fits: tuple[WidthFit, ...]
    drift: Estimate | None
    window_shift: Estimate | None
    regret: Estimate | None
    noise: Noise
    predicted: float | None
    wider: WiderIsBetter | None
    verdict: Verdict
    reasons: tuple[str, ...]
    knob: str = LR

    @property
    def usable(self) -> tuple[WidthFit, ...]:
        """The widths with a resolved optimum."""
        return tuple(fit for fit in self.fits if not fit.problems)

    def best_loss(self, fit: WidthFit) -> Estimate:
        """Loss at the optimum of one width, the mean over its seeds.

        Resampled seeds would not do for its interval: two can agree by luck. So it is that of this width's noise, steadied
        by the arm's, with Student's t; as if the optimum were one point of the grid.
        """
        value, noise = fit.best_losses[:1], self.noise
        if noise.sigma is None or fit.sigma is None:
            return Estimate(value)
        rng = np.random.default_rng([fit.width, *self.arm.encode()])
        error = noise.total_at(fit.width) / math.sqrt(len(fit.cells.losses))
        draws = value + error * rng.standard_normal(len(fit.means) - 1)
        return Estimate(student_t(np.concatenate([value, draws]), noise.total_freedom, rng))


@dataclass(frozen=True, eq=False)
class TransferResult:
    """All arms and the verdict over them, with reasons in words.

    doubts: why the runs may not be what they claim; any of them makes the verdict INCONCLUSIVE, and is among the reasons.
    notes: what else there is to know of the runs, such as columns of the table that were not used.
    """

    arms: dict[str, ArmResult]
    verdict: Verdict
    reasons: tuple[str, ...]
    thresholds: Thresholds
    doubts: tuple[Doubt, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def knob(self) -> str:
        """What was turned, in all arms."""
        return next(iter(self.arms.values())).knob

    def summary(self) -> str:
        """A table for a terminal, at most 100 columns wide but for the reasons."""
        return "\n".join(_summary_lines(self))

    def to_json(self, forecasts: Mapping[str, Forecast | str] | None = None) -> str:
        """Everything but the resamples as strict JSON; what is not a finite number is null.

        forecasts: by arm, to be included, or why there is none. se is half the central 68 % interval.
        """
        told = _as_dict(self)
        if forecasts is not None:
            told["forecasts"] = {arm: _forecast(forecast) for arm, forecast in forecasts.items()}
        return json.dumps(_plain(told), indent=1, allow_nan=False)


def _summary_lines(result: TransferResult) -> Iterator[str]:
    lr = " lr" if is_rate(result.knob) else ""
    names = ("width", "seeds", "points", f"best log2{lr}", f"best{lr}", "curvature", "loss")
    header = "{:>8} {:>5} {:>6} {:>15} {:>9} {:>9} {:>8}  stable".format(*names)
    for arm in result.arms.values():
        role = "" if arm.predicted is None else f"  (control, predicted drift {arm.predicted:+g})"
        yield f"arm {arm.arm}{role}" + ("" if lr else f", knob {result.knob}")
        yield header
        for fit in arm.fits:
            error = "" if math.isnan(fit.optimum_se) else f" +- {fit.optimum_se:.2f}"
            position = f"{fit.optimum:+.2f}{error}" + ("!" if fit.problems else " ")
            first = f", not {lr_text(fit.cells.diverged[0])}" if fit.cells.diverged else " (end)"
            stable = "nothing" if math.isnan(fit.largest_stable) else lr_text(fit.largest_stable)
            yield (
                f"{fit.width:>8} {len(fit.cells.losses):>5} {len(fit.cells.log2_lr):>6} {position:>15}"
                f" {2**fit.optimum:>9.4g} {fit.curvature:>9.4f} {fit.best_losses[0]:>8.4f}"
                f"  to {stable}{first}"
            )
        yield f"  {arm.verdict}"
        yield from (f"  - {text}" for text in arm.reasons)
        if arm.wider:
            yield f"  - {arm.wider}"
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
        "knob": result.knob,
        "arms": {
            name: {
                "verdict": arm.verdict,
                "reasons": arm.reasons,
                "predicted_drift": arm.predicted,
                "base_width": arm.base_width,
                "drift": _numbers(arm.drift),
                "window_shift": _numbers(arm.window_shift),
                "regret": _numbers(arm.regret),
                "sigma": arm.noise.sigma,
                "seed_sd": arm.noise.total,
                "wider_is_better": arm.wider and asdict(arm.wider),
                "widths": [
                    {
                        "width": fit.width,
                        "log2_lr": fit.cells.log2_lr.tolist(),
                        "mean_loss": fit.cells.mean.tolist(),
                        "runs": fit.cells.runs.tolist(),
                        "diverged_log2_lr": fit.cells.diverged,
                        "largest_stable_log2_lr": fit.largest_stable,
                        "optimum_log2_lr": fit.optimum,
                        "optimum_se": fit.optimum_se,
                        "best_loss": _numbers(arm.best_loss(fit)),
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


def _forecast(forecast: Forecast | str) -> dict[str, Any] | str:
    if isinstance(forecast, str):
        return forecast
    numbers = {"loss": _numbers(forecast.loss), "log2_lr": _numbers(forecast.log2_lr)}
    return {"width": forecast.width, **numbers, "method": forecast.method}


def _numbers(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    low, high = estimate.interval(0.6827)  # Student's t with few degrees of freedom has no standard deviation
    intervals = {"interval_90": estimate.interval(0.9), "interval_95": estimate.interval(0.95)}
    return {"value": estimate.value, "se": (high - low) / 2, **intervals}


def _plain(value: Any) -> Any:
    """The same with tuples as lists and what is not finite as None."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
