"""Does the best learning rate stay put as the model gets wider? The estimator, the equivalence test and the verdict.

    result = measure_transfer(read_runs("sweep.csv"), controls={"sp": -1.0})
    print(result.summary())

Learning rates live on a log2 axis, in octaves. At each width a parabola through the points near the lowest loss gives
the optimum; the slope of the optima on log2(width) is the drift, in octaves per doubling of width. Transfer means that
the drift is shown to be small, which is an equivalence test: "no significant drift" is what a noisy sweep says of
anything. Runs of one seed share initialisation and batches over all learning rates, so seeds are resampled whole.

Intervals speak of noise. That a loss curve is no parabola is the business of the second, narrow window.

Arrays named draws, and the rows of `Bowls`, hold the estimate from the data in row 0 and resamples in rows 1 to B.
Shapes: S seeds, K stable learning rates, W widths, R = 1 + B rows.
"""

from __future__ import annotations

import csv
import enum
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speedrun_mup.core.utils import UserError

Array = NDArray[np.float64]
CurveKey = tuple[str, int, float, int]  # arm, width, lr, seed


class TransferError(UserError):
    """A table of runs that cannot be read or analysed."""

    exit_code = 3


class Verdict(enum.StrEnum):
    """What the runs show."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class Thresholds:
    """Every number that decides a verdict. Write them down before the runs; a change afterwards is post hoc.

    The window is as wide in octaves at every width, whatever the grid, so that the skew of the loss curve shifts every
    optimum alike and cancels in the drift. On a grid of octaves it holds 5 points, the narrow one 3.
    """

    equivalence: float = 0.25  # octaves per doubling: the 90 % interval of the drift must lie inside +- this
    max_drift: float = 0.15  # octaves per doubling: the drift itself
    max_regret: float = 0.005  # nats lost at the widest width by keeping the base width's learning rate ...
    regret_sigmas: float = 2.0  # ... or this many standard deviations of one run, whichever is more
    min_widths: int = 3
    min_span: float = 4.0  # widest width over narrowest
    window: float = 2.0  # octaves on either side of the lowest point that the parabola sees
    narrow_window: float = 1.0  # the same for the check that the window does not matter
    window_excess: float = 0.05  # points this fraction above the lowest loss are cliff, not bowl
    max_window_shift: float = 0.15  # octaves per doubling: narrow drift minus drift, unless noise (2 SE) explains it
    max_scatter: float = 0.25  # octaves: one optimum's distance from the line, unless noise (3 SE) explains it
    max_unresolved: float = 0.05  # share of resamples without a minimum inside the grid
    vertex_floor: float = 0.05  # octaves: no optimum is weighted as if it were known better than this
    wider_skip: float = 0.02  # fraction of training that "wider is better" leaves out
    wider_sigmas: float = 2.0
    max_violations: float = 0.02  # share of logged steps at which a wider model may be worse


# ---------------------------------------------------------------------------------------------------------------------
# The table of runs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One finished run. lr: learning rate, absolute or a factor on all rates. loss: nan or inf if the run diverged."""

    width: int
    lr: float
    seed: int
    loss: float
    arm: str = "mup"

    @property
    def log2_lr(self) -> float:
        """Position on the learning-rate axis, rounded so that equal rates written differently are one grid point."""
        return round(math.log2(self.lr), 6)


def read_runs(path: str | Path) -> list[Run]:
    """Runs from a CSV with columns width, lr, seed, loss and, if you like, arm; case and other columns do not matter.

    A loss of nan, inf or "diverged" marks a diverged run. Raises TransferError naming row (1 is the header) and column.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise TransferError(f"{path}: cannot be read ({fault}); give a CSV file in UTF-8") from None
    reader = csv.DictReader(text.splitlines(), restval="")
    names = [name.strip().lower() for name in reader.fieldnames or []]
    reader.fieldnames = names
    for column in ("width", "lr", "seed", "loss"):
        if names.count(column) != 1:
            found = "no column" if column not in names else "more than one column"
            raise TransferError(f"{path}: {found} {column!r} in the header ({','.join(names)}); name it once")
    runs: dict[tuple[str, int, float, int], Run] = {}
    for row in reader:
        where = f"{path} row {reader.line_num}"
        width = _number(row, "width", where, whole=True, positive=True)
        lr = _number(row, "lr", where, positive=True)
        seed = _number(row, "seed", where, whole=True)
        loss = math.nan if row["loss"].strip().lower() == "diverged" else _number(row, "loss", where, finite=False)
        run = Run(int(width), lr, int(seed), loss, row.get("arm", "").strip() or "mup")
        key = (run.arm, run.width, run.log2_lr, run.seed)
        if key in runs:
            same = f"arm {run.arm}, width {run.width}, lr {lr:g}, seed {run.seed}"
            raise TransferError(f"{where}: {same} is there twice; drop one")
        runs[key] = run
    if not runs:
        raise TransferError(f"{path}: a header but no rows; give one row per finished run")
    return list(runs.values())


def _number(
    row: dict[str, str], column: str, where: str, *, whole: bool = False, positive: bool = False, finite: bool = True
) -> float:
    """The number in `column`, or a TransferError that says what should stand there."""
    try:
        value = float(row[column])
        good = not (finite and not math.isfinite(value)) and not (whole and value % 1) and not (positive and value <= 0)
    except ValueError:
        value, good = math.nan, False
    if not good:
        kind = f"a {'positive ' if positive else ''}{'whole ' if whole else ''}number"
        hint = "" if finite else " (write nan or diverged for a run that blew up)"
        raise TransferError(f"{where}, column {column}: {row[column]!r} should be {kind}{hint}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Estimates
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number with its resamples. draws: (R,), row 0 the number itself; R = 1 if the noise is unknown."""

    draws: Array = field(repr=False)

    @property
    def value(self) -> float:
        """The estimate from the data as they are."""
        return float(self.draws[0])

    @property
    def se(self) -> float:
        """Standard error; nan if the noise is unknown or without bounds."""
        noise = self.draws[1:]
        return float(noise.std()) if len(noise) and np.isfinite(noise).all() else math.nan

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Central interval at confidence `level`; (nan, nan) if the noise is unknown."""
        if len(self.draws) == 1:
            return math.nan, math.nan
        low, high = np.quantile(self.draws[1:], [(1 - level) / 2, (1 + level) / 2], method="nearest")
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.interval()
        known = f"90 % interval {low:+.3f} to {high:+.3f}" if len(self.draws) > 1 else "interval unknown"
        return f"{self.value:+.3f} ({known})"


@dataclass(frozen=True, eq=False)
class Bowls:
    """Parabolas near the minimum of R curves: loss = a + b (x - center) + c (x - center)**2. Every field is (R,).

    left, right: the window that was fitted. resolved: c > 0, lowest grid point not at an end, vertex inside the window.
    """

    center: Array
    a: Array
    b: Array
    c: Array
    left: Array
    right: Array
    resolved: NDArray[np.bool_]

    @property
    def vertex(self) -> Array:
        """The optimum, log2 lr; the end of the window that looks better where the parabola has no vertex inside."""
        with np.errstate(divide="ignore", invalid="ignore"):
            free = np.where(self.c > 0, self.center - self.b / (2 * self.c), np.where(self.b < 0, np.inf, -np.inf))
        return np.clip(free, self.left, self.right)

    @property
    def floor(self) -> Array:
        """Loss at the optimum."""
        return self.at(self.vertex)

    def at(self, x: Array) -> Array:
        """Loss at log2 lr `x`."""
        u = x - self.center
        return self.a + u * (self.b + u * self.c)


def fit_bowls(log2_lr: Array, losses: Array, window: float, excess: float) -> Bowls:
    """Least-squares parabola to each row of `losses` (R, K) over the points of the grid `log2_lr` (K,) in its window.

    The window: the lowest point, its two neighbours, and what lies within `window` octaves of it and not more than
    `excess` (a fraction) above it. Loss curves are steeper on the right, so the whole range would pull the vertex left.
    """
    index = np.arange(len(log2_lr))
    best = losses.argmin(axis=1)
    lowest = losses.min(axis=1, keepdims=True)
    u = log2_lr - log2_lr[best, None]
    first = np.clip(best - 1, 0, len(log2_lr) - 3)[:, None]
    near = (np.abs(u) < window + 1e-3) & (losses <= lowest + excess * np.abs(lowest))
    inside = near | ((index >= first) & (index < first + 3))
    powers = np.stack([np.ones_like(u), u, u * u], axis=2)  # (R, K, 3)
    weighted = powers * inside[:, :, None]
    normal = weighted.transpose(0, 2, 1) @ powers
    a, b, c = np.linalg.solve(normal, (weighted * losses[:, :, None]).sum(axis=1)[:, :, None])[:, :, 0].T
    center = log2_lr[best]
    left = np.where(inside, log2_lr, np.inf).min(axis=1)
    right = np.where(inside, log2_lr, -np.inf).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = center - b / (2 * c)
    resolved = (c > 0) & (left < vertex) & (vertex < right) & (best > 0) & (best < len(log2_lr) - 1)
    return Bowls(center, a, b, c, left, right, resolved)


@dataclass(frozen=True, eq=False)
class Cells:
    """The stable part of one arm's sweep at one width.

    log2_lr: (K,) ascending. losses: (S, K), nan where that seed was not run. filled: the same with the gaps filled so
    that their residual from seed effect + learning-rate effect is zero (Yates 1933); its column means are then those of
    the additive fit, so a seed that misses a learning rate does not tilt the curve. diverged: log2 lr of unstable
    points; one diverged seed makes the point unstable, since the mean of the survivors would flatter it.
    """

    width: int
    log2_lr: Array
    losses: Array
    filled: Array
    diverged: tuple[float, ...]

    @property
    def runs(self) -> Array:
        """Runs per learning rate, (K,)."""
        return np.isfinite(self.losses).sum(axis=0).astype(float)

    @property
    def mean(self) -> Array:
        """Loss per learning rate, seed offsets removed, (K,)."""
        return self.filled.mean(axis=0)

    def noise(self, window: float, excess: float) -> Array:
        """Residuals near the optimum, (2, 2): sums of squares about (seed + lr effects, lr effects), their freedoms."""
        bowl = fit_bowls(self.log2_lr, self.mean[None], window, excess)
        near = (self.log2_lr >= bowl.left) & (self.log2_lr <= bowl.right)
        block, seen = self.filled[:, near], np.isfinite(self.losses[:, near])
        about_lr = np.where(seen, block - block.mean(axis=0), 0.0)
        about_both = block - block.mean(axis=0) - block.mean(axis=1, keepdims=True) + block.mean()
        spare = seen.sum() - near.sum()
        freedom = [max(spare - seen.any(axis=1).sum() + 1, 0), spare]
        return np.array([[(about_both**2).sum(), (about_lr**2).sum()], freedom])

    def resample(self, resamples: int, sigma: float, offset: float, rng: np.random.Generator) -> Array:
        """Mean curves (R, K): the data, then `resamples` with whole seeds drawn again, paired over learning rates.

        Deviations are widened by sqrt(S / (S - 1)), which makes the variance of a mean over S seeds unbiased. What the
        seeds cannot show, because a point was run with fewer of them or there is only one, is drawn as Gaussian noise:
        `sigma` per run, and `offset` for the shared offset of a lone seed.
        """
        n = len(self.filled)
        if n > 1:
            shares = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n - 1 / n
            seeds = shares @ self.filled * math.sqrt(n / (n - 1))
            shown = (self.runs - 1) / (n * (n - 1))
        else:
            seeds = offset * rng.standard_normal((resamples, 1))
            shown = np.zeros(len(self.log2_lr))
        rest = sigma * np.sqrt(1 / self.runs - shown) * rng.standard_normal((resamples, len(self.log2_lr)))
        return np.concatenate([self.mean[None], self.mean + seeds + rest])


@dataclass(frozen=True, eq=False)
class WidthFit:
    """One width of one arm: its curve, the optimum, and what is wrong with it.

    means: (R, K) mean curves. optimum_se: octaves, nan if the noise is unknown; the larger of what the resampled seeds
    and the residual noise say, for two seeds can agree by luck. weight: of the optimum in the drift. sigma: standard
    deviation of one run, seed offset removed. problems: sentences; a width with any does not enter the drift.
    """

    cells: Cells
    means: Array
    bowls: Bowls
    narrow: Bowls
    optimum_se: float
    weight: float
    sigma: float | None
    problems: tuple[str, ...]

    @property
    def width(self) -> int:
        """The width."""
        return self.cells.width

    @property
    def optimum(self) -> float:
        """Best learning rate, log2."""
        return float(self.bowls.vertex[0])

    @property
    def best_losses(self) -> Array:
        """Loss at the optimum (R,), read off the narrow parabola, which keeps closer to the points."""
        return self.narrow.at(self.bowls.vertex)

    @property
    def curvature(self) -> float:
        """Nats per octave squared."""
        return float(self.bowls.c[0])

    @property
    def largest_stable(self) -> float:
        """log2 of the largest learning rate below every divergence; the end of the grid without any, nan for none."""
        below = self.cells.log2_lr[self.cells.log2_lr < min(self.cells.diverged, default=math.inf)]
        return float(below.max()) if len(below) else math.nan

    def loss_at(self, x: Array) -> Array:
        """Loss at log2 lr `x` (R,): parabola in its window, lines between the means outside, inf where runs diverge."""
        grid = self.cells.log2_lr
        right = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
        row = np.arange(len(x))
        t = np.clip((x - grid[right - 1]) / (grid[right] - grid[right - 1]), 0, 1)
        lines = (1 - t) * self.means[row, right - 1] + t * self.means[row, right]
        loss = np.where((x >= self.bowls.left) & (x <= self.bowls.right), self.bowls.at(x), lines)
        return np.where(x >= min(self.cells.diverged, default=math.inf), np.inf, loss)


@dataclass(frozen=True)
class WiderIsBetter:
    """Whether a wider model is at least as good at every step, at one learning rate and on the same data.

    share: of logged steps, over all neighbouring widths, at which the wider model is worse by more than the noise.
    largest: the worst excess in nats, with its (narrow, wide, step).
    """

    log2_lr: float
    share: float
    largest: float
    where: tuple[int, int, int] | None
    verdict: Verdict

    def __str__(self) -> str:
        text = f"wider is better at lr {_lr(self.log2_lr)}: {self.verdict}, {self.share:.1%} of steps violate it"
        if self.where:
            narrow, wide, step = self.where
            text += f", at worst by {self.largest:.3f} at step {step} (width {wide} against {narrow})"
        return text


@dataclass(frozen=True, eq=False)
class ArmResult:
    """One parametrization over all widths, ascending in fits.

    drift: octaves per doubling; None without two usable widths. window_shift: how much it changes when the parabolas
    see the narrow window only. regret: nats lost at the widest usable width by using the base width's optimum there;
    None if that has none. sigma: of one run, pooled over widths, seed offset removed; seed_sd: with the offset.
    predicted: the drift that a control is built to have; None for an arm under test.
    """

    arm: str
    base_width: int
    fits: tuple[WidthFit, ...]
    drift: Estimate | None
    window_shift: Estimate | None
    regret: Estimate | None
    sigma: float | None
    seed_sd: float
    predicted: float | None
    wider: WiderIsBetter | None
    verdict: Verdict
    reasons: tuple[str, ...]

    @property
    def usable(self) -> tuple[WidthFit, ...]:
        """The widths with a resolved optimum."""
        return tuple(fit for fit in self.fits if not fit.problems)


@dataclass(frozen=True, eq=False)
class TransferResult:
    """All arms and the verdict over them, with reasons in words."""

    arms: dict[str, ArmResult]
    verdict: Verdict
    reasons: tuple[str, ...]
    thresholds: Thresholds

    def summary(self) -> str:
        """A table for a terminal, at most 100 columns wide but for the reasons."""
        return "\n".join(_summary_lines(self))

    def to_json(self) -> str:
        """Everything but the resamples as strict JSON; what is not a finite number is null."""
        return json.dumps(_plain(_as_dict(self)), indent=1, allow_nan=False)


# ---------------------------------------------------------------------------------------------------------------------
# The measurement
# ---------------------------------------------------------------------------------------------------------------------


def measure_transfer(
    runs: Iterable[Run],
    *,
    controls: Mapping[str, float] | None = None,
    tested: Collection[str] | None = None,
    base_width: int | None = None,
    sigma: float | None = None,
    initial_loss: float = math.inf,
    curves: Mapping[CurveKey, Array] | None = None,
    thresholds: Thresholds | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> TransferResult:
    """Optima, drift, regret and verdict for every arm of a sweep.

    controls: arm -> predicted drift in octaves per doubling, for arms built to fail; if one does not, nothing passes.
    tested: arms that the verdict is about, by default all but the controls; any others are measured for comparison.
    base_width: where the learning rate would be tuned; default: the narrowest. sigma: standard deviation of the loss
    between runs that differ only in chance; needed only if no point was run with two seeds, used wherever there is one.
    initial_loss: runs that end at or above it count as diverged. curves: (arm, width, lr, seed) -> (T, 2) step and
    training loss, for "wider is better". The same arguments give the same numbers. Raises TransferError.
    """
    controls, curves, thresholds = controls or {}, curves or {}, thresholds or Thresholds()
    table: dict[str, dict[int, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        table[run.arm][run.width].append(run)
    if not table:
        raise TransferError("no runs: give one Run per finished run")
    tested = set(table) - set(controls) if tested is None else set(tested)
    for arm in sorted(tested - set(table)):
        raise TransferError(f"arm {arm!r} is to be tested but was not run; there are {', '.join(table)}")
    for arm, predicted in controls.items():
        if arm not in table:
            raise TransferError(f"control {arm!r} is not among the arms ({', '.join(table)}); run it or do not name it")
        if not predicted:
            raise TransferError(f"control {arm!r}: a predicted drift of 0 cannot fail; give the drift its error causes")
    cells, problems = {}, {}
    for arm, widths in table.items():
        if base_width is not None and base_width not in widths:
            have = ", ".join(map(str, sorted(widths)))
            raise TransferError(f"base_width={base_width} was not run in arm {arm}; it has {have}")
        sorted_cells = [_cells(width, widths[width], initial_loss) for width in sorted(widths)]
        cells[arm] = [cell for cell in sorted_cells if isinstance(cell, Cells)]
        problems[arm] = [cell for cell in sorted_cells if isinstance(cell, str)]
    everywhere = [cell for arm in cells.values() for cell in arm]
    arms = {}
    for arm in table:
        noise = _Noise.of(cells[arm], everywhere, sigma, thresholds)
        fits = tuple(_fit_width(arm, cell, noise, thresholds, resamples, seed) for cell in cells[arm])
        base = base_width or min(table[arm])
        rng = np.random.default_rng([seed, *arm.encode()])
        arms[arm] = _measure_arm(arm, base, fits, problems[arm], noise, controls.get(arm), curves, thresholds, rng)
    return TransferResult(arms, *_overall(arms, tested, thresholds), thresholds)


def _cells(width: int, runs: Sequence[Run], initial_loss: float) -> Cells | str:
    """One width's runs as a table, or the sentence that says why they make none."""
    ok = {run: math.isfinite(run.loss) and run.loss < initial_loss for run in runs}
    diverged = tuple(sorted({run.log2_lr for run in runs if not ok[run]}))
    grid = sorted({run.log2_lr for run in runs} - set(diverged))
    seeds = sorted({run.seed for run in runs if run.log2_lr in grid})
    if len(grid) < 3:
        downwards = " downwards" if diverged else ""
        return f"width {width}: {len(grid)} stable learning rates, at least 3 are needed; extend the sweep{downwards}"
    losses = np.full((len(seeds), len(grid)), np.nan)
    for run in runs:
        if run.log2_lr in grid:
            losses[seeds.index(run.seed), grid.index(run.log2_lr)] = run.loss
    row, column = np.nonzero(np.isfinite(losses))
    design = np.concatenate([np.eye(len(seeds))[row], np.eye(len(grid))[column]], axis=1)
    effects, _, rank, _ = np.linalg.lstsq(design, losses[row, column], rcond=None)
    if rank < len(seeds) + len(grid) - 1:
        return f"width {width}: its seeds share too few learning rates to be compared; run one seed on the whole grid"
    additive = effects[: len(seeds), None] + effects[None, len(seeds) :]
    return Cells(width, np.array(grid), losses, np.where(np.isfinite(losses), losses, additive), diverged)


@dataclass(frozen=True)
class _Noise:
    """The noise of one arm's runs. sigma: of one run, seed offset removed, or None if unknown; total: with the offset.

    freedom: degrees of freedom behind sigma. own: width -> (sum of squares, degrees of freedom).
    """

    sigma: float | None
    total: float
    freedom: float
    own: dict[int, tuple[float, float]]

    @staticmethod
    def of(arm: Sequence[Cells], everywhere: Sequence[Cells], given: float | None, thresholds: Thresholds) -> _Noise:
        """Pooled over the widths of the arm; over all arms if this one has no replicates."""

        def residuals(some: Sequence[Cells]) -> Array:
            rows = [cells.noise(thresholds.window, thresholds.window_excess) for cells in some]
            return np.array(rows).reshape(-1, 2, 2)

        mine = residuals(arm)
        own = {cells.width: (float(row[0, 0]), float(row[1, 0])) for cells, row in zip(arm, mine)}
        squares, freedom = (mine if mine[:, 1, 0].any() else residuals(everywhere)).sum(axis=0)
        if freedom[0] == 0:
            return _Noise(given, given or 0.0, math.inf, own)
        pooled, total = (float(value) for value in np.sqrt(squares / freedom))
        if given is None:
            return _Noise(pooled, max(total, pooled), float(freedom[0]), own)
        return _Noise(given, max(total, given), math.inf, own)

    def at(self, width: int) -> float | None:
        """Sigma at one width: its own residuals, steadied by the pooled sigma as if that were 4 more."""
        if self.sigma is None:
            return None
        squares, freedom = self.own[width]
        return math.sqrt((squares + 4 * self.sigma**2) / (freedom + 4))


def _fit_width(arm: str, cells: Cells, noise: _Noise, thresholds: Thresholds, resamples: int, seed: int) -> WidthFit:
    """Fit one width and list what stands in the way of using it."""
    rng = np.random.default_rng([seed, cells.width, *arm.encode()])
    sigma = noise.at(cells.width)

    def fit(means: Array, window: float) -> Bowls:
        return fit_bowls(cells.log2_lr, means, window, thresholds.window_excess)

    if noise.sigma is None or sigma is None:
        means, error, weight = cells.mean[None], math.nan, 1.0
    else:
        offset = math.sqrt(max(noise.total**2 - noise.sigma**2, 0.0))
        means = cells.resample(resamples, noise.sigma, offset, rng)
        # A few seeds give a poor variance, and so poor weights; the residuals of all points near the optimum do not.
        gaussian = cells.mean + sigma / np.sqrt(cells.runs) * rng.standard_normal((500, len(cells.log2_lr)))
        error = float(fit(gaussian, thresholds.window).vertex.std())
        weight = 1 / (error**2 + thresholds.vertex_floor**2)
    bowls = fit(means, thresholds.window)
    error = max(error, Estimate(bowls.vertex).se)
    problems = tuple(f"width {cells.width}: {text}" for text in _problems(cells, bowls, thresholds))
    return WidthFit(cells, means, bowls, fit(means, thresholds.narrow_window), error, weight, sigma, problems)


def _problems(cells: Cells, bowls: Bowls, thresholds: Thresholds) -> Iterator[str]:
    """What keeps this optimum from being one, most basic first."""
    grid = cells.log2_lr
    lowest = float(bowls.center[0])
    vertex = float(bowls.vertex[0])
    cliff = min((x for x in cells.diverged if x > lowest), default=math.inf)
    broken = [x for x in cells.diverged if x < lowest]
    if broken:
        yield f"diverged at {_lr(broken[-1])}, left of the minimum at {_lr(lowest)}: not for its learning rate"
    elif lowest == grid[0]:
        yield f"minimum at the left edge of the grid: extend the sweep to {_lr(2 * grid[0] - grid[1])}"
    elif lowest == grid[-1] and cliff < math.inf:
        yield f"minimum at {_lr(lowest)}, next to the divergence at {_lr(cliff)}: add {_lr((lowest + cliff) / 2)}"
    elif lowest == grid[-1]:
        yield f"minimum at the right edge of the grid: extend the sweep to {_lr(2 * grid[-1] - grid[-2])}"
    elif not bowls.resolved[0]:
        yield f"no parabola with a minimum inside the window around {_lr(lowest)}: add seeds or points there"
    elif cliff - vertex < (step := float(grid[np.searchsorted(grid, lowest) + 1]) - lowest) - 1e-6:
        where = f"less than a grid step ({step:g} octaves) right of the optimum at {_lr(vertex)}"
        yield f"diverges at {_lr(cliff)}, {where}: add points in between"
    elif len(bowls.resolved) > 1 and (lost := 1 - bowls.resolved[1:].mean()) > thresholds.max_unresolved:
        yield f"{lost:.0%} of the resamples have no minimum inside the grid: add seeds or extend the sweep"


def _measure_arm(
    arm: str,
    base_width: int,
    fits: tuple[WidthFit, ...],
    problems: Sequence[str],
    noise: _Noise,
    predicted: float | None,
    curves: Mapping[CurveKey, Array],
    thresholds: Thresholds,
    rng: np.random.Generator,
) -> ArmResult:
    """Drift, regret, "wider is better" and the verdict of one arm."""
    usable = [fit for fit in fits if not fit.problems]
    base = next((fit for fit in usable if fit.width == base_width), None)
    trouble = [*problems, *(text for fit in fits for text in fit.problems)]
    drift = shift = regret = wider = None
    if len(usable) > 1:
        line = _line(usable)
        drift = Estimate(_drift_draws(line, usable, noise, rng))
        shift = Estimate(line @ np.array([fit.narrow.vertex - fit.bowls.vertex for fit in usable]))
        trouble += _scatter(usable, drift.value, thresholds)
    if base:
        regret = Estimate(usable[-1].loss_at(base.bowls.vertex) - usable[-1].bowls.floor)
    mine = {key: curve for key, curve in curves.items() if key[0] == arm}
    if base and mine:
        wider = wider_is_better(mine, base.optimum, thresholds)
    verdict, reasons = _judge(fits, usable, drift, shift, regret, trouble, thresholds)
    return ArmResult(
        arm, base_width, fits, drift, shift, regret, noise.sigma, noise.total, predicted, wider, verdict, tuple(reasons)
    )


def _line(usable: Sequence[WidthFit]) -> Array:
    """Coefficients (W,) that turn optima into their weighted least-squares slope on log2 width."""
    doublings = np.log2([fit.width for fit in usable])
    weights = np.array([fit.weight for fit in usable])
    centred = doublings - np.average(doublings, weights=weights)
    return weights * centred / (weights * centred**2).sum()


def _drift_draws(line: Array, usable: Sequence[WidthFit], noise: _Noise, rng: np.random.Generator) -> Array:
    """Slopes (R,), resamples spread out to Student's t.

    A variance that comes from 2 or 3 seeds per width is itself uncertain, and a normal interval would cover too little.
    Degrees of freedom after Satterthwaite: S - 1 for each width with seeds; widths with a lone seed share sigma's.
    """
    optima = np.array([fit.bowls.vertex for fit in usable])
    draws = line @ optima
    parts = line**2 * optima[:, 1:].var(axis=1) if len(draws) > 1 else np.zeros(len(line))
    if not parts.sum():
        return draws
    seeds = np.array([len(fit.cells.filled) for fit in usable])
    lone = seeds == 1
    uncertainty = (parts[~lone] ** 2 / (seeds[~lone] - 1)).sum() + parts[lone].sum() ** 2 / noise.freedom
    if uncertainty:
        freedom = parts.sum() ** 2 / uncertainty
        draws[1:] = draws[0] + (draws[1:] - draws[0]) * np.sqrt(freedom / rng.chisquare(freedom, len(draws) - 1))
    return draws


def _scatter(usable: Sequence[WidthFit], drift: float, thresholds: Thresholds) -> tuple[str, ...]:
    """A sentence if the optima do not lie on a line, so that a small slope would say little."""
    optima = np.array([fit.optimum for fit in usable])
    errors = np.nan_to_num([fit.optimum_se for fit in usable])
    doublings = np.log2([fit.width for fit in usable])
    weights = [fit.weight for fit in usable]
    rest = optima - np.average(optima, weights=weights) - drift * (doublings - np.average(doublings, weights=weights))
    excess = np.abs(rest) - np.maximum(thresholds.max_scatter, 3 * errors)
    worst = int(excess.argmax())
    if excess[worst] <= 0:
        return ()
    return (f"width {usable[worst].width}: optimum {rest[worst]:+.2f} octaves off the line through all widths",)


def _judge(
    fits: Sequence[WidthFit],
    usable: Sequence[WidthFit],
    drift: Estimate | None,
    shift: Estimate | None,
    regret: Estimate | None,
    trouble: Sequence[str],
    thresholds: Thresholds,
) -> tuple[Verdict, list[str]]:
    """One arm's verdict with its reasons: what blocks a verdict, else what fails, else what falls short of a pass."""
    if drift is None or shift is None:
        return Verdict.INCONCLUSIVE, [*trouble, f"{len(usable)} usable widths: no drift without two"]
    limit, bound = thresholds.equivalence, thresholds.max_drift
    low, high = drift.interval()
    measured = f"drift {drift} octave per doubling"
    blocked = list(trouble)
    widths = [fit.width for fit in fits]
    if len(widths) < thresholds.min_widths or widths[-1] < thresholds.min_span * widths[0]:
        need = f"{thresholds.min_widths} widths that span a factor of {thresholds.min_span:g}"
        blocked.append(f"widths {', '.join(map(str, widths))} are too few or too close: needs {need}")
    if math.isnan(low):
        blocked.append("the noise is unknown: run some learning rates with a second seed, or pass sigma")
    if blocked:
        return Verdict.INCONCLUSIVE, [*blocked, f"{measured} over {len(usable)} widths"]

    widest = usable[-1]
    allowed = max(thresholds.max_regret, thresholds.regret_sigmas * (widest.sigma or 0.0))
    cost = f"regret {regret.value:.4f} nats at width {widest.width}, allowed {allowed:.4f}" if regret else ""
    if regret and math.isinf(regret.value):
        cost = f"width {widest.width} diverges at the base width's optimum"
    failed = []
    if low > bound or high < -bound:
        failed.append(f"{measured}: beyond the tolerated +-{bound:g}")
    if regret and regret.interval()[0] > allowed:
        failed.append(cost)
    if failed:
        return Verdict.FAIL, failed

    short = []
    reach = max(high - drift.value, drift.value - low)
    if not -limit < low <= high < limit:
        text = f"{measured}: the interval is not inside +-{limit:g}"
        if abs(drift.value) < bound:
            more = max(2, math.ceil((reach / (limit - abs(drift.value))) ** 2))
            text += f"; about {more} times the seeds would settle it"
        short.append(text)
    elif abs(drift.value) > bound:
        short.append(f"{measured}: more than {bound:g}, but not surely")
    if regret and regret.value > allowed:
        short.append(f"{cost}, but noise could explain it")
    if abs(shift.value) > max(thresholds.max_window_shift, 2 * shift.se):
        narrow = f"drift {drift.value + shift.value:+.3f} from the narrow window, {drift.value:+.3f} from the wide one"
        short.append(f"{narrow}: the answer depends on the window; add half-octave points near the optima")
    if short:
        return Verdict.INCONCLUSIVE, short
    return Verdict.PASS, [f"{measured}: inside +-{limit:g}, and at most {bound:g}", cost]


def _overall(
    arms: Mapping[str, ArmResult], names: Collection[str], thresholds: Thresholds
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict over the arms `names`: nothing counts unless every control failed the way its error predicts."""
    controls = [result for result in arms.values() if result.predicted is not None]
    tested = [result for result in arms.values() if result.arm in names and result.predicted is None]
    if not tested:
        raise TransferError(f"every arm ({', '.join(arms)}) is a control or left out; nothing is left to judge")
    verdicts = {result.verdict for result in tested}
    verdict = next(v for v in (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS) if v in verdicts)
    reasons = [f"arm {result.arm}: {result.verdict}, {text}" for result in tested for text in result.reasons]
    if not controls:
        reasons.append("no control arm: nothing shows that this sweep would have noticed a wrong rule")
    for result in controls:
        sign = math.copysign(1.0, result.predicted or 0.0)
        need = f"{'above' if sign > 0 else 'below'} {sign * thresholds.equivalence:+g}"
        low, high = result.drift.interval() if result.drift else (math.nan, math.nan)
        enough = len(result.usable) >= thresholds.min_widths
        if enough and min(sign * low, sign * high) > thresholds.equivalence:
            reasons.append(f"control {result.arm} failed as predicted ({result.predicted:+g}): drift {result.drift}")
        else:
            verdict = Verdict.INCONCLUSIVE
            found = f"drift {result.drift}" if enough and result.drift else "; ".join(result.reasons)
            reasons.insert(0, f"control {result.arm} did not fail as predicted: {found}; the interval must lie {need}")
    return verdict, tuple(reasons)


def wider_is_better(
    curves: Mapping[CurveKey, Array], log2_lr: float, thresholds: Thresholds | None = None
) -> WiderIsBetter:
    """Compare the training curves of neighbouring widths of one arm, at the common learning rate nearest `log2_lr`.

    curves: (arm, width, lr, seed) -> (T, 2) step and training loss; same seed, same batches. The noise of the gap (mean
    over common seeds) is taken from its jumps between neighbouring steps, by the median, so that a trend does not
    count. Raises TransferError if two neighbouring widths have nothing in common.
    """
    thresholds = thresholds or Thresholds()
    rates: dict[int, set[float]] = defaultdict(set)
    table: dict[tuple[int, float], dict[int, Array]] = defaultdict(dict)
    for (_, width, lr, seed), curve in curves.items():
        at = round(math.log2(lr), 6)
        rates[width].add(at)
        table[width, at][seed] = np.asarray(curve, dtype=float)
    shared = set.intersection(*rates.values())
    if len(rates) < 2 or not shared:
        raise TransferError("training curves: no learning rate that two or more widths share; log the same ones")
    at = min(shared, key=lambda rate: (abs(rate - log2_lr), rate))
    total = violations = 0
    largest, where = 0.0, None
    widths = sorted(rates)
    for narrow, wide in itertools.pairwise(widths):
        steps, gap = _gap(table[narrow, at], table[wide, at])
        if len(steps) < 3:
            raise TransferError(f"training curves: widths {narrow} and {wide} share fewer than 3 steps of one seed")
        jumps = np.abs(np.diff(gap[np.isfinite(gap)]))
        noise = float(np.median(jumps)) / (0.6745 * math.sqrt(2)) if len(jumps) else 0.0
        late = steps > thresholds.wider_skip * steps[-1]
        steps, gap = steps[late], gap[late]
        worse = gap > thresholds.wider_sigmas * noise
        total, violations = total + len(worse), violations + int(worse.sum())
        if worse.any() and gap.max() > largest:
            largest, where = float(gap.max()), (narrow, wide, int(steps[gap.argmax()]))
    share = violations / total
    verdict = Verdict.PASS if share <= thresholds.max_violations else Verdict.FAIL
    return WiderIsBetter(at, share, largest, where, verdict)


def _gap(narrow: Mapping[int, Array], wide: Mapping[int, Array]) -> tuple[Array, Array]:
    """Steps that all common seeds logged, and the wide model's loss minus the narrow one's there, mean over seeds.

    A loss that is no number counts as infinite; where both models have one, neither is worse.
    """
    seeds = sorted(set(narrow) & set(wide))
    if not seeds:
        return np.zeros(0), np.zeros(0)
    logged = [set(curve[:, 0]) for side in (narrow, wide) for curve in (side[seed] for seed in seeds)]
    steps = np.array(sorted(set.intersection(*logged)))
    loss = [[side[seed][np.isin(side[seed][:, 0], steps), 1] for seed in seeds] for side in (narrow, wide)]
    means = np.nan_to_num(np.mean(loss, axis=1), nan=np.inf, posinf=np.inf)
    with np.errstate(invalid="ignore"):
        return steps, np.nan_to_num(means[1] - means[0], nan=0.0, posinf=np.inf, neginf=-np.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Forecast
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Forecast:
    """What to expect of one run at `width`, at its best learning rate, everything else being as in the sweep.

    loss: with the scatter of that one run. log2_lr: the rate to use. exponent: of the width in the excess loss.
    """

    width: int
    loss: Estimate
    log2_lr: Estimate
    exponent: Estimate
    method: str

    def __str__(self) -> str:
        loss, low, high = (f"{value:.4f}" for value in (self.loss.value, *self.loss.interval()))
        lr, slow, fast = (f"{2**value:.4g}" for value in (self.log2_lr.value, *self.log2_lr.interval()))
        ranges = [f" (90 % {low} to {high})", f" (90 % {slow} to {fast})"] if len(self.loss.draws) > 1 else ["", ""]
        return f"width {self.width}: loss {loss}{ranges[0]}, lr {lr}{ranges[1]}; {self.method}"


def loss_forecast(arm: ArmResult, width: int, seed: int = 0) -> Forecast:
    """Loss and best learning rate at `width`, from the widths of one arm.

    The law is loss(w) = a + b w**-p, fitted by least squares with every width counting the same: how far the law holds,
    and not seed noise, is what separates widths. Four widths determine p, which is searched from 0 (loss linear in
    log w) to 1.5. Two or three do not, and then a guess decides: log w falls for ever where 1/w is flat. So p = 1/2
    gives the number, and every resample draws p between 0 and 1, which spans what is published: from small powers of
    the parameter count (Kaplan et al., arXiv 2001.08361) to the 1/w of a model near its infinite-width limit (Vyas et
    al., arXiv 2305.18411). The interval therefore grows with ignorance of the law.

    The learning rate is the mean of the optima if the arm passed, else the drift is followed out to `width`.
    Raises TransferError with fewer than two usable widths.
    """
    fits = arm.usable
    if len(fits) < 2 or arm.drift is None:
        raise TransferError(f"arm {arm.arm}: a forecast needs two widths with an optimum, it has {len(fits)}")
    rng = np.random.default_rng([seed, width, *arm.arm.encode()])
    losses = np.array([fit.best_losses for fit in fits]).T  # (R, W)
    doublings = np.log2([fit.width / fits[-1].width for fit in fits])
    rows = len(losses)
    if len(fits) >= 4:
        trials = [_power_law(doublings, losses, np.full(rows, p), 0.0) for p in np.linspace(0, 1.5, 61)]
        best = np.array([rest for _, rest in trials]).argmin(axis=0)
        exponent = np.linspace(0, 1.5, 61)[best]
        law = f"a + b w^-{exponent[0]:.2f} through {len(fits)} widths"
    else:
        exponent = np.concatenate([[0.5], rng.uniform(0, 1, rows - 1)])
        law = f"a + b w^-p through {len(fits)} widths, p between 0 and 1 unknown"
    loss, _ = _power_law(doublings, losses, exponent, math.log2(width / fits[-1].width))
    loss[1:] += arm.seed_sd * rng.standard_normal(rows - 1)

    optima = np.array([fit.bowls.vertex for fit in fits])  # (W, R)
    weights = np.array([fit.weight for fit in fits])
    rate, advice = weights @ optima / weights.sum(), "mean of the optima, since they do not drift"
    if arm.verdict is not Verdict.PASS:
        middle = float(np.average(np.log2([fit.width for fit in fits]), weights=weights))
        rate = rate + arm.drift.draws * (math.log2(width) - middle)
        advice = f"following a drift of {arm.drift.value:+.2f} octave per doubling, since transfer is not shown"
    return Forecast(width, Estimate(loss), Estimate(rate), Estimate(exponent), f"loss from {law}; rate: {advice}")


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


# ---------------------------------------------------------------------------------------------------------------------
# Words, tables, JSON
# ---------------------------------------------------------------------------------------------------------------------


def _lr(log2_lr: float) -> str:
    """A learning rate for a reader: 2^-1.5 on a grid of quarter octaves, else a plain number."""
    quarters = 4 * log2_lr
    return f"2^{log2_lr:g}" if abs(quarters - round(quarters)) < 1e-5 else f"{2**log2_lr:.3g}"


def _summary_lines(result: TransferResult) -> Iterator[str]:
    names = ("width", "seeds", "points", "best log2 lr", "best lr", "curvature", "loss")
    header = "{:>8} {:>5} {:>6} {:>15} {:>9} {:>9} {:>8}  stable".format(*names)
    for arm in result.arms.values():
        role = "" if arm.predicted is None else f"  (control, predicted drift {arm.predicted:+g})"
        yield f"arm {arm.arm}{role}"
        yield header
        for fit in arm.fits:
            error = "" if math.isnan(fit.optimum_se) else f" +- {fit.optimum_se:.2f}"
            position = f"{fit.optimum:+.2f}{error}" + ("!" if fit.problems else " ")
            first = f", not {_lr(fit.cells.diverged[0])}" if fit.cells.diverged else " (end)"
            stable = "nothing" if math.isnan(fit.largest_stable) else _lr(fit.largest_stable)
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


def _as_dict(result: TransferResult) -> dict[str, Any]:
    return {
        "verdict": result.verdict,
        "reasons": result.reasons,
        "thresholds": asdict(result.thresholds),
        "arms": {
            name: {
                "verdict": arm.verdict,
                "reasons": arm.reasons,
                "predicted_drift": arm.predicted,
                "base_width": arm.base_width,
                "drift": _numbers(arm.drift),
                "window_shift": _numbers(arm.window_shift),
                "regret": _numbers(arm.regret),
                "sigma": arm.sigma,
                "seed_sd": arm.seed_sd,
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
                        "best_loss": _numbers(Estimate(fit.best_losses)),
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


def _numbers(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    intervals = {"interval_90": estimate.interval(0.9), "interval_95": estimate.interval(0.95)}
    return {"value": estimate.value, "se": estimate.se, **intervals}


def _plain(value: Any) -> Any:
    """The same with tuples as lists and what is not finite as None."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
