"""What a coordinate check measured, what muP predicts of it, and the verdict."""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speedrun_mup.core.mup import DepthRole, ParamSpec, Role
from speedrun_mup.core.mup.spec import starred
from speedrun_mup.files import strict_json

Array = NDArray[np.float64]
Place = Role | DepthRole  # of a parameter: which sides grow with width, or where it stands to the residual stream


class CheckVerdict(enum.StrEnum):
    """What the check shows, from best to worst. Only PASS is success."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


def worst(verdicts: Iterable[CheckVerdict | None]) -> CheckVerdict:
    """The worst verdict there is; None stands for what is not judged."""
    order = list(CheckVerdict)
    return max((verdict for verdict in verdicts if verdict), key=order.index, default=CheckVerdict.PASS)


@dataclass(frozen=True)
class SlopeThresholds:
    """Every number that decides a verdict. Wrong rules are off by a multiple of 1/2, right ones measure below 0.15."""

    warn: float = 0.15  # log2 per doubling of the size, between the measured and the predicted slope
    fail: float = 0.30
    first_step: int = 3  # from here on t is judged; before, layers that start at zero hide what lies behind them
    min_widths: int = 3
    min_span: float = 4.0  # largest size over smallest
    gradients: bool = True  # whether the gradient's slope counts: it matters for Adam's eps only
    lean: float = 0.0  # what deviations of right rules lean to
    bounds: bool = False  # whether to tell updates by their norm, and attention by the largest score that it may reach
    narrow: int = 0  # updates of matrices with a side that grows from below this may fall with width, by NARROW

    def judge(self, deviation: float) -> CheckVerdict:
        """The verdict on a slope that is off by `deviation`. What is not finite is a FAIL."""
        size = abs(deviation - self.lean)
        return CheckVerdict.PASS if size <= self.warn else CheckVerdict.WARN if size <= self.fail else CheckVerdict.FAIL


THRESHOLDS = SlopeThresholds()
# For a model that is not ours: one limit, halfway between a right rule and one that is wrong by 1/2. In small models of any
# family updates line up with their inputs a little less as they get wider: right rules measure -0.23 to +0.17 there, wrong
# ones below -0.5 or above +0.3. How often that errs is counted by benchmarks/foreign_models.py.
FOREIGN = SlopeThresholds(warn=0.30, fail=0.30, gradients=False, lean=-0.06, bounds=True, narrow=8)
# Adam's rule takes it that an update has few directions next to the sides of its matrix. With a side of 2 to 16 it fills them
# all, and what it does to any one direction then falls with width, by 1/2 at most: Mamba's dt_proj measures -0.38 there,
# and -0.23 at the same widths with a side of 8 to 64.
NARROW = 0.25


# The slopes of muP. A readout starts as a sum of d random terms over d, so it starts small; but one that is the embedding
# too, TIED, already knows the token just read: its start has no slope of its own, it only must not grow. Scalars have no
# rule that could be wrong, and few entries, which make their slopes noisy: they are shown, and have to move, but are not judged.
PREDICTED: dict[str, dict[Role, float]] = {
    "update": {Role.INPUT: 0.0, Role.HIDDEN: 0.0, Role.OUTPUT: 0.0},
    "init": {Role.INPUT: 0.0, Role.HIDDEN: 0.0, Role.OUTPUT: -0.5},
    "gradient": {Role.INPUT: -1.0, Role.HIDDEN: -1.0, Role.OUTPUT: -1.0},
}
# And those of depth, if every layer is to learn as much whatever their number, and all of them together to change the stream as
# much: each adds 1 / layers of it (Dey et al., CompleteP, arXiv 2505.01618). Coefficients of the stream are scalars.
PREDICTED_IN_DEPTH: dict[str, dict[DepthRole | None, float]] = {
    "update": {DepthRole.OUTSIDE: 0.0, DepthRole.BRANCH: 0.0, DepthRole.WRITES: -1.0},
    "init": {},
    "gradient": {},
    "stream": {None: 0.0},  # share of the stream after the last layer that is not along x0: what the layers added
}


@dataclass(frozen=True)
class CheckedAxis:
    """The size that a check scales, and what is expected along it.

    Args:
        name: of the size.
        words: several of them; what has most and least of it.
        predicted: quantity -> place of a parameter, or None for what is none -> slope.
    """

    name: str
    words: tuple[str, str, str]
    predicted: Mapping[str, Mapping[Any, float]]

    def place(self, spec: ParamSpec, tied: bool = False) -> Place:
        """That of a parameter; tied: as the readout that it is too."""
        if self.name == "width":
            return Role.OUTPUT if tied else spec.role
        return DepthRole.OUTSIDE if tied else spec.depth_role


WIDTH = CheckedAxis("width", ("widths", "widest", "narrowest"), PREDICTED)
DEPTH = CheckedAxis("n_layer", ("numbers of layers", "deepest", "shallowest"), PREDICTED_IN_DEPTH)
CHECKED_AXES = {axis.name: axis for axis in (WIDTH, DEPTH)}
TIED = " (readout)"  # follows the name of an embedding where that is the readout too
NORMS = ("norm", "update norm", "flatness")  # of HIDDEN matrices after the last update, not judged: see observe.norms


@dataclass(frozen=True)
class Series:
    """One quantity of one tensor. values (W, T + 1): geometric mean over seeds; nan where it is zero or not taken.

    quantity: effect (init at t = 0, update from then on), gradient, activation, stream, loss or one of NORMS. role: None
    for what is no parameter.
    """

    quantity: str
    name: str
    role: Place | None
    values: Array

    @property
    def kind(self) -> str:
        """What the same tensors of all layers share: the name with stars for numbers, without the place in a stack."""
        kind = starred(self.name)
        return kind if self.quantity == "activation" else re.sub(r"\[\d+\]$", "", kind)

    def slope(self, widths: Sequence[int], times: slice) -> float | None:
        """Of log2(value) on log2(width), by least squares. Mean over those `times` when no width lacks it; None if never."""
        logs = np.log2(self.values[:, times])
        logs = logs[:, ~np.isnan(logs).any(axis=0)]
        if not logs.size:
            return None
        x = np.log2(widths) - np.log2(widths).mean()
        with np.errstate(invalid="ignore"):
            return float(x @ logs.mean(axis=1) / (x @ x))


@dataclass(frozen=True)
class SlopeRow:
    """The mean slope of the `tensors` of one kind. predicted and verdict: None for what is not judged."""

    quantity: str
    kind: str
    role: Place | None
    tensors: int
    slope: float
    predicted: float | None
    verdict: CheckVerdict | None
    error: float | None = None  # standard error over seeds; None with one
    slack: float = 0.0  # how far below what is predicted the slope of a right rule may lie

    @property
    def deviation(self) -> float:
        """What the verdict is on: the slope without what is predicted; where nothing is, how much it grows."""
        if self.predicted is None:
            return max(self.slope, 0.0)
        off = self.slope - self.predicted
        return off if off > 0 else min(off + self.slack, 0.0)


@dataclass(frozen=True)
class CheckedArm:
    """What one arm measured. widths: the sizes, along whichever axis. problems: why its slopes prove nothing."""

    name: str
    widths: tuple[int, ...]
    seeds: int
    series: tuple[Series, ...]
    rows: tuple[SlopeRow, ...]
    problems: tuple[str, ...]

    @property
    def verdict(self) -> CheckVerdict:
        """INCONCLUSIVE if there are problems, else the worst of the rows."""
        return CheckVerdict.INCONCLUSIVE if self.problems else worst(row.verdict for row in self.rows)

    @property
    def noise(self) -> float | None:
        """The standard error of a judged slope, pooled over rows; None with one seed."""
        errors = [row.error for row in self.rows if row.verdict and row.error is not None]
        return math.sqrt(sum(error**2 for error in errors) / len(errors)) if errors else None

    def update_slope(self, role: Place | None) -> float:
        """The mean update slope of all tensors of `role` (None: of all that are judged), over what it should be.

        nan if there are none.
        """
        rows = [row for row in self.rows if row.quantity == "update" and row.verdict and role in (None, row.role)]
        off = sum((row.slope - (row.predicted or 0.0)) * row.tensors for row in rows)
        return off / sum(row.tensors for row in rows) if rows else math.nan


@dataclass(frozen=True)
class ControlResult:
    """What a control measured. slope: of the updates of `role`, `predicted` to be so far off. seen: it is, by a FAIL."""

    arm: CheckedArm
    role: Place | None
    slope: float
    predicted: float
    seen: bool

    @property
    def whose(self) -> str:
        """Which updates the slope is of."""
        return "all updates" if self.role is None else f"{self.role.value} updates"


@dataclass(frozen=True)
class CoordCheck:
    """The outcome of a check: its `verdict`, the `reasons` if it is INCONCLUSIVE, and all that was measured."""

    arm: CheckedArm
    controls: tuple[ControlResult, ...]
    steps: int
    thresholds: SlopeThresholds
    axis: str = "width"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why a PASS would prove nothing; empty if it does."""
        blind = (
            f"control {c.arm.name} was not detected: its {c.whose} have slope {c.slope:+.2f}, not about {c.predicted:+.1f}"
            for c in self.controls
            if not c.seen
        )
        untested = () if self.controls else ("no control was run: nothing shows that a wrong rule would be detected",)
        return (*self.arm.problems, *untested, *blind)

    @property
    def verdict(self) -> CheckVerdict:
        """That on the checked arm, but INCONCLUSIVE if there are reasons against it. A FAIL needs no control."""
        return (
            self.arm.verdict if self.arm.verdict is CheckVerdict.FAIL or not self.reasons else CheckVerdict.INCONCLUSIVE
        )

    @property
    def chance_of_another(self) -> float:
        """How likely other seeds are to give the other verdict, if slopes are normal with the noise measured here."""
        noise = max(self.arm.noise or 0.0, 1e-9)
        chances = {CheckVerdict.PASS: [0.0], CheckVerdict.FAIL: [1.0]}
        for row in self.arm.rows:
            if row.verdict in chances:
                margin = abs(abs(row.deviation - self.thresholds.lean) - self.thresholds.fail)
                chances[row.verdict].append(math.erfc(margin / noise / math.sqrt(2)) / 2)
        if self.arm.verdict is CheckVerdict.FAIL:
            return math.prod(chances[CheckVerdict.FAIL])  # all of them would have to come back
        return 1 - math.prod(1 - chance for chance in chances[CheckVerdict.PASS])

    def summary(self) -> str:
        """A table for the terminal."""
        return "\n".join(_summary_lines(self))

    def to_json(self) -> str:
        """All that was measured, as strict JSON; null where a value is zero, not finite or was not taken."""
        return strict_json({"verdict": self.verdict, "reasons": self.reasons} | asdict(self))

    def plot(self, path: str | Path) -> None:
        """Draw updates, start and activations against width, for the model and for its controls: the figure of a report."""
        from speedrun_mup.report.checks import check_figure  # not for everybody who reads results
        from speedrun_mup.report.png import draw

        draw(check_figure(json.loads(self.to_json())), Path(path))


def _summary_lines(check: CoordCheck) -> Iterator[str]:
    arm = check.arm
    by_kind: dict[tuple[str, Place | None], dict[str, SlopeRow]] = {}
    words, predicted = CHECKED_AXES[check.axis].words, CHECKED_AXES[check.axis].predicted
    for row in arm.rows:
        by_kind.setdefault((row.kind, row.role), {})[row.quantity] = row
    pad = 2 + max(20, *(len(kind) for kind, _ in by_kind), *(len("control " + c.arm.name) for c in check.controls))

    def table(title: str, quantities: Sequence[str]) -> Iterator[str]:
        judged = quantities != NORMS
        yield ""
        yield f"{title:<{pad}}{'role':<8}{''.join(f'{q:<15}' for q in quantities)}{'verdict' if judged else ''}".rstrip()
        for (kind, role), rows in by_kind.items():
            if shown := [rows[q] for q in quantities if q in rows]:
                cells = "".join(f"{_cell(rows.get(q)):<15}" for q in quantities)
                verdict = worst(row.verdict for row in shown) if any(row.verdict for row in shown) else ""
                yield f"{kind:<{pad}}{role.value if role else '':<8}{cells}{verdict}".rstrip()

    sizes = f"{words[0]} {', '.join(map(str, arm.widths))}"
    yield f"coordinate check of {arm.name}: {sizes}; {check.steps} updates; seeds: {arm.seeds}"
    yield from table("slope (predicted)", tuple(PREDICTED))
    if "stream" in predicted:
        yield from table("what all layers add", ("stream",))
    yield from table("must not grow", ("activation",))
    yield from table("not judged", NORMS)
    yield ""
    for c in check.controls:
        outcome = "detected" if c.seen else "NOT DETECTED"
        yield f"{'control ' + c.arm.name:<{pad}}{c.slope:+.2f} ({c.predicted:+.1f}) on {c.whose}: {outcome}"
    label = "inconclusive" if check.verdict is CheckVerdict.INCONCLUSIVE else "note"
    yield from (f"{label}: {reason}" for reason in check.reasons)
    if arm.noise is not None and check.thresholds.warn == check.thresholds.fail:
        low, high = (check.thresholds.lean + sign * check.thresholds.fail for sign in (-1, 1))
        yield f"limits {low:+.2f} and {high:+.2f}: between a right rule (0) and the nearest wrong one (1/2)"
        yield f"error: {check.chance_of_another:.1%} of other seeds would call it otherwise; one moves a slope by {arm.noise:.2f}"
    yield from _advice(arm.rows)
    yield f"verdict: {check.verdict}"


def _advice(rows: Iterable[SlopeRow]) -> Iterator[str]:
    """Suggested fixes for failing rows."""
    off = [row for row in rows if row.verdict in (CheckVerdict.WARN, CheckVerdict.FAIL)]
    if names := ", ".join(row.kind for row in off if row.quantity == "init"):
        yield f"init of {names}: initialise with mup.init, after set_base_shapes; or a forward multiplier is wrong"
    if names := ", ".join(row.kind for row in off if re.search(r"(^|\.)scores(\[\d+\])?(\.bound)?$", row.kind)):
        yield f"{names}: if heads widen with the model, scale scores by 1 / head_dim (docs/mup-library.md)"


def _cell(row: SlopeRow | None) -> str:
    if row is None:
        return "-"
    return f"{row.slope:+.2f}" if row.predicted is None else f"{row.slope:+.2f} ({row.predicted:+.1f})"
