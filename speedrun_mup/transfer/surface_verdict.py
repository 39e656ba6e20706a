"""All arms of a sweep over several sizes, and the verdict over them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from speedrun_mup.files import printable, strict_json
from speedrun_mup.transfer.axes import RATE, Axes
from speedrun_mup.transfer.claims import Doubt, open_doubts, values_doubt
from speedrun_mup.transfer.points import Point, TransferError
from speedrun_mup.transfer.setting_columns import ROUNDED
from speedrun_mup.transfer.surface import fit_surface
from speedrun_mup.transfer.surface_results import Surface, SurfaceForecast
from speedrun_mup.transfer.thresholds import Thresholds, Verdict, worst

Controls = Mapping[str, Mapping[str, float]]  # arm -> size -> the drift off the rule that its error predicts


@dataclass(frozen=True, eq=False)
class SurfaceResult:
    """The surface of every arm, and the verdict over those under test, with reasons. doubts: why the runs may not be what
    they claim; any makes the verdict INCONCLUSIVE."""

    arms: dict[str, Surface]
    tested: tuple[str, ...]
    verdict: Verdict
    reasons: tuple[str, ...]
    doubts: tuple[Doubt, ...] = ()
    notes: tuple[str, ...] = ()

    def predict(self, sizes: Mapping[str, int]) -> dict[str, SurfaceForecast]:
        """What to expect at `sizes` of every arm under test."""
        return {name: self.arms[name].predict(sizes) for name in self.tested}

    def summary(self) -> str:
        """A table per arm for a terminal, then the verdict with its reasons."""
        tables = [f"{surface.summary()}\n" for surface in self.arms.values()]
        lines = [f"verdict: {self.verdict}", *(f"- {text}" for text in self.reasons)]
        return "\n".join([*tables, *lines, *(f"note: {text}" for text in self.notes)])

    def to_json(self, forecasts: Mapping[str, SurfaceForecast] | None = None) -> str:
        """Everything but the resamples as strict JSON; what is not a finite number is null."""
        told: dict[str, Any] = {
            "verdict": self.verdict,
            "reasons": self.reasons,
            "doubts": [asdict(doubt) for doubt in self.doubts],
            "notes": self.notes,
            "arms": {name: surface.to_dict() for name, surface in self.arms.items()},
        }
        if forecasts is not None:
            told["forecasts"] = {name: forecast.to_dict() for name, forecast in forecasts.items()}
        return strict_json(told, indent=1)


def measure_surface(
    points: Iterable[Point],
    sizes: Sequence[str],
    *,
    hyperparameter: str = RATE,
    controls: Controls | None = None,
    tested: Collection[str] | None = None,
    doubts: Sequence[Doubt] = (),
    accept: Collection[str] = (),
    notes: Sequence[str] = (),
    thresholds: Thresholds | None = None,
    **options: Any,
) -> SurfaceResult:
    """`fit_surface` for every arm of runs over several sizes, and the verdict over all.

    Args:
        points: The finished runs.
        sizes: Names of the axes.
        hyperparameter: What was tuned.
        controls: For arms that are built to fail: the drift off the rule, on some axis, that they must show.
        tested: Arms that the verdict is about; default: all but the controls.
        doubts: Whether the runs are what they claim; any that is not in `accept`, by its kind, makes INCONCLUSIVE of a verdict.
        accept: Kinds of doubts that are set aside.
        notes: What else is known about the runs.
        thresholds: Every number that decides a verdict.
        options: For `fit_surface`.

    Raises:
        TransferError: In one line, for runs that cannot be measured, with the arm.
    """
    controls, thresholds = controls or {}, thresholds or Thresholds()
    by_arm: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by_arm[point.arm].append(point)
    have = ", ".join(printable(arm, 60) for arm in list(by_arm)[:20]) or "none"
    if unknown := sorted({*controls, *(tested or ())} - set(by_arm)):
        raise TransferError(f"arm {printable(unknown[0], 60)} was not run; there are {have}")
    mine = tuple(arm for arm in by_arm if arm not in controls and (not tested or arm in tested))
    if not mine:
        raise TransferError(f"every arm ({have}) is a control or left out; nothing is left to judge")
    _check_controls(controls, sizes)
    arms = {}
    for arm, some in by_arm.items():
        try:
            arms[arm] = fit_surface(some, sizes, hyperparameter=hyperparameter, thresholds=thresholds, **options)
        except TransferError as fault:
            raise TransferError(f"arm {printable(arm, 60)}: {fault}" if len(by_arm) > 1 else str(fault)) from None
    known = {doubt.kind for doubt in doubts}
    found = [*doubts, *(doubt for doubt in _other_sizes(by_arm, sizes) if doubt.kind not in known)]
    left = open_doubts(found, accept)
    verdict, reasons = _overall(arms, mine, controls, thresholds)
    if left:
        verdict = Verdict.INCONCLUSIVE
    told = (*notes, *(f"accepted: {doubt.text}" for doubt in found if doubt not in left))
    return SurfaceResult(arms, mine, verdict, (*(doubt.text for doubt in left), *reasons), tuple(left), told)


def _check_controls(controls: Controls, sizes: Sequence[str]) -> None:
    """Raises TransferError for a control that cannot fail."""
    for arm, drifts in controls.items():
        for name, drift in drifts.items():
            if name not in sizes:
                raise TransferError(
                    f"control {printable(arm, 60)}: {printable(name, 60)} is no size here; there are {', '.join(sizes)}"
                )
            if not (drift and math.isfinite(drift)):
                raise TransferError(
                    f"control {arm}: a drift of {drift:g} cannot be shown; give the one its error causes"
                )


def _other_sizes(by_arm: Mapping[str, Sequence[Point]], sizes: Sequence[str]) -> Iterator[Doubt]:
    """A doubt for every further size on which the stable runs of one arm differ, unless it follows from the measured ones."""
    for arm, some in by_arm.items():
        stable = [point for point in some if math.isfinite(point.loss)]
        for name in sorted({name for point in stable for name in point.sizes} - set(sizes)):
            values: dict[int, list[Point]] = defaultdict(list)
            for point in stable:
                if name in point.sizes:
                    values[point.sizes[name]].append(point)
            if max(values) - min(values) > ROUNDED * max(values):
                told = {str(value): runs for value, runs in values.items()}
                yield values_doubt(name, told, Axes(sizes[0]), arm if len(by_arm) > 1 else None)


def _overall(
    arms: Mapping[str, Surface], tested: Sequence[str], controls: Controls, thresholds: Thresholds
) -> tuple[Verdict, tuple[str, ...]]:
    """The worst verdict of the arms under test; nothing counts unless every control failed the way its error predicts."""
    verdict = worst(arms[name].verdict for name in tested)
    reasons = [f"arm {name}: {arms[name].verdict}" for name in tested]
    if not controls:
        reasons.append("no control arm: nothing shows that this sweep would have noticed a wrong rule")
    for arm, drifts in controls.items():
        for name, drift in drifts.items():
            axis, sign = arms[arm][name], math.copysign(1.0, drift)
            off = sorted(sign * (end - axis.predicted) for end in axis.drift.interval())
            if off[0] > thresholds.equivalence:
                reasons.append(f"control {arm} failed on {name} as predicted ({drift:+g}): drift {axis.drift}")
            else:
                verdict = Verdict.INCONCLUSIVE
                need = f"{sign * thresholds.equivalence:+g} off the rule"
                reasons.insert(
                    0,
                    f"control {arm} did not fail on {name} as predicted: drift {axis.drift}; it must lie beyond {need}",
                )
    return verdict, tuple(reasons)
