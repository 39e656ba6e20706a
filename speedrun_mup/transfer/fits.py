"""One size: its table of losses, the quadratic fit near the minimum, the optimum, and the noise of all that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from speedrun_mup.transfer.axes import Axes
from speedrun_mup.transfer.points import Point, TransferError, value_text
from speedrun_mup.transfer.thresholds import Thresholds

Array = NDArray[np.float64]
MOST_SEEDS, MOST_POINTS = 100, 200  # at one size


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
class QuadraticFit:
    """Quadratic fits near the minimum of R curves: loss = a + b (x - center) + c (x - center)**2. Every field is (R,).

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
        """The optimum, log2; the end of the window that looks better where the fit has no vertex inside."""
        with np.errstate(divide="ignore", invalid="ignore"):
            free = np.where(self.c > 0, self.center - self.b / (2 * self.c), np.where(self.b < 0, np.inf, -np.inf))
        return np.clip(free, self.left, self.right)

    @property
    def min_loss(self) -> Array:
        """Loss at the optimum."""
        return self.at(self.vertex)

    def at(self, x: Array) -> Array:
        """Loss at log2 value `x`."""
        u = x - self.center
        return self.a + u * (self.b + u * self.c)


def fit_quadratics(log2_value: Array, losses: Array, window: float, excess: float) -> QuadraticFit:
    """Least-squares quadratic fit to each row of `losses` (R, K) over the points of the grid `log2_value` (K,) in its window.

    The window: the lowest point, its two neighbours, and what lies within `window` (log2) of it and not more than
    `excess` (a fraction) above it. Loss curves are steeper on the right, so the whole range would pull the vertex left.
    """
    index = np.arange(len(log2_value))
    best = losses.argmin(axis=1)
    lowest = losses.min(axis=1, keepdims=True)
    u = log2_value - log2_value[best, None]
    first = np.clip(best - 1, 0, len(log2_value) - 3)[:, None]
    near = (np.abs(u) < window + 1e-3) & (losses <= lowest + excess * np.abs(lowest))
    inside = near | ((index >= first) & (index < first + 3))
    powers = np.stack([np.ones_like(u), u, u * u], axis=2)  # (R, K, 3)
    weighted = powers * inside[:, :, None]
    normal = weighted.transpose(0, 2, 1) @ powers
    a, b, c = np.linalg.solve(normal, (weighted * losses[:, :, None]).sum(axis=1)[:, :, None])[:, :, 0].T
    center = log2_value[best]
    left = np.where(inside, log2_value, np.inf).min(axis=1)
    right = np.where(inside, log2_value, -np.inf).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = center - b / (2 * c)
    resolved = (c > 0) & (left < vertex) & (vertex < right) & (best > 0) & (best < len(log2_value) - 1)
    return QuadraticFit(center, a, b, c, left, right, resolved)


@dataclass(frozen=True, eq=False)
class LossTable:
    """The stable part of one arm's sweep at one size.

    Args:
        log2_value: Of the hyperparameter, (K,) ascending.
        losses: (S, K), nan where that seed was not run.
        filled: The same with the gaps filled so that their residual from seed effect + value effect is zero (Yates 1933);
            its column means are then those of the additive fit, so a seed that misses a value does not tilt the curve.
        diverged: log2 of unstable values; one diverged seed makes a value unstable, since averaging only the surviving
            seeds would bias the loss down.
        seeds: Of the rows.
    """

    axes: Axes
    size: int
    log2_value: Array
    losses: Array
    filled: Array
    diverged: tuple[float, ...]
    seeds: tuple[int, ...] = ()

    @property
    def place(self) -> str:
        """Where it lies on the size axis, for a reader: "width 64"."""
        return self.axes.at(self.size)

    @property
    def runs(self) -> Array:
        """Runs per value, (K,)."""
        return np.isfinite(self.losses).sum(axis=0).astype(float)

    @property
    def mean(self) -> Array:
        """Loss per value, seed offsets removed, (K,)."""
        return self.filled.mean(axis=0)

    def noise(self, window: float, excess: float) -> Array:
        """Residuals near the optimum, (2, 2): sums of squares about (seed + value effects, value effects), their freedoms."""
        fit = fit_quadratics(self.log2_value, self.mean[None], window, excess)
        near = (self.log2_value >= fit.left) & (self.log2_value <= fit.right)
        block, seen = self.filled[:, near], np.isfinite(self.losses[:, near])
        about_value = np.where(seen, block - block.mean(axis=0), 0.0)
        about_both = block - block.mean(axis=0) - block.mean(axis=1, keepdims=True) + block.mean()
        spare = seen.sum() - near.sum()
        freedom = [max(spare - seen.any(axis=1).sum() + 1, 0), spare]
        return np.array([[(about_both**2).sum(), (about_value**2).sum()], freedom])

    def resample(self, resamples: int, sigma: float, offset: float, rng: np.random.Generator) -> Array:
        """Mean curves (R, K): the data, then `resamples` with whole seeds drawn again, paired over values.

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
            shown = np.zeros(len(self.log2_value))
        rest = sigma * np.sqrt(1 / self.runs - shown) * rng.standard_normal((resamples, len(self.log2_value)))
        return np.concatenate([self.mean[None], self.mean + seeds + rest])


def build_loss_table(axes: Axes, size: int, runs: Sequence[Point], initial_loss: float) -> LossTable | str:
    """One size's runs as a table, or the sentence that says why they make none."""
    placed = [(run.log2_value, run.seed, run.loss) for run in runs]
    diverged = {at for at, _, loss in placed if not (math.isfinite(loss) and loss < initial_loss)}
    stable = [run for run in placed if run[0] not in diverged]
    grid, seeds = sorted({at for at, _, _ in stable}), sorted({seed for _, seed, _ in stable})
    if len(grid) < 3:
        downwards = " downwards" if diverged else ""
        return f"{axes.at(size)}: {len(grid)} stable points, at least 3 are needed; extend the sweep{downwards}"
    column, row = ({value: number for number, value in enumerate(values)} for values in (grid, seeds))
    if not _connected(len(seeds), len(grid), ((row[seed], column[at]) for at, seed, _ in stable)):
        return f"{axes.at(size)}: its seeds share too few points to be compared; run one seed on the whole grid"
    if len(seeds) > MOST_SEEDS or len(grid) > MOST_POINTS:
        have = f"{len(seeds)} seeds and {len(grid)} {axes.values}"
        return f"{axes.at(size)}: {have}; give at most {MOST_SEEDS} and {MOST_POINTS}"
    losses = np.full((len(seeds), len(grid)), np.nan)
    for at, seed, loss in stable:
        losses[row[seed], column[at]] = loss
    return LossTable(axes, size, np.array(grid), losses, _filled(losses), tuple(sorted(diverged)), tuple(seeds))


def _connected(rows: int, columns: int, cells: Iterable[tuple[int, int]]) -> bool:
    """Whether a path through `cells` leads from every row and column to every other, so that an additive fit is unique."""
    parent = list(range(rows + columns))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    parts = rows + columns
    for row, column in cells:
        one, other = root(row), root(rows + column)
        if one != other:
            parent[one] = other
            parts -= 1
    return parts == 1


def _filled(losses: Array) -> Array:
    """`losses` (S, K) with gaps filled from the additive fit of seed and value effects."""
    seen = np.isfinite(losses)
    if seen.all():
        return losses
    row, column = np.nonzero(seen)
    design = np.concatenate([np.eye(len(losses))[row], np.eye(losses.shape[1])[column]], axis=1)
    effects = np.linalg.lstsq(design, losses[row, column], rcond=None)[0]
    return np.where(seen, losses, effects[: len(losses), None] + effects[None, len(losses) :])


@dataclass(frozen=True)
class Noise:
    """The noise of one arm's runs. sigma: of one run, seed offset removed, or None if unknown; total: with the offset.

    freedom: degrees of freedom behind sigma; total_freedom: behind total, one for each seed of a size beyond its first.
    own: size -> (sum of squares, degrees of freedom); own_total: size -> (variance with the offset, seeds beyond the
    first).
    """

    sigma: float | None
    total: float
    freedom: float
    total_freedom: float
    own: dict[int, tuple[float, float]]
    own_total: dict[int, tuple[float, int]]

    @staticmethod
    def of(
        arm: Sequence[LossTable], everywhere: Sequence[LossTable], given: float | None, thresholds: Thresholds
    ) -> Noise:
        """Pooled over the sizes of the arm; over all arms if this one has no replicates; `given` if none has.

        Raises TransferError for a `given` that would overrule replicates, or is no standard deviation.
        """
        if given is not None and not 0 < given < math.inf:
            raise TransferError(f"--sigma {given:g}: must be positive and finite: a standard deviation in nats")

        def residuals(some: Sequence[LossTable]) -> Array:
            rows = [table.noise(thresholds.window, thresholds.window_excess) for table in some]
            return np.array(rows).reshape(-1, 2, 2)

        mine = residuals(arm)
        own = {table.size: (float(row[0, 0]), float(row[1, 0])) for table, row in zip(arm, mine)}
        own_total = {
            table.size: (float(row[0, 1] / max(row[1, 1], 1)), len(table.filled) - 1) for table, row in zip(arm, mine)
        }
        source, rows = (arm, mine) if mine[:, 1, 0].any() else (everywhere, residuals(everywhere))
        squares, freedom = rows.sum(axis=0)
        if freedom[0] == 0:
            return Noise(given, given or 0.0, math.inf, math.inf, own, own_total)
        pooled, total = (float(value) for value in np.sqrt(squares / freedom))
        if pooled < 1e-9 * max(abs(float(table.mean.min())) for table in source):
            raise TransferError("all seeds have the same losses near the optimum; give more digits")
        if given is not None:
            raise TransferError(f"--sigma {given:g}: runs with several seeds already give the noise; leave it out")
        seeds = sum(len(table.filled) - 1 for table in source)
        return Noise(pooled, max(total, pooled), float(freedom[0]), float(seeds), own, own_total)

    def steadied(self, total: float, freedom: float) -> Noise:
        """With what is known of `total` from elsewhere, as if `freedom` more degrees of freedom had shown it."""
        if not math.isfinite(self.total_freedom):
            return self
        whole = self.total_freedom + freedom
        pooled = math.sqrt((self.total_freedom * self.total**2 + freedom * total**2) / whole)
        return replace(self, total=pooled, total_freedom=whole)

    def at(self, size: int) -> float | None:
        """Sigma at one size: its own residuals, steadied by the pooled sigma as if that were 4 more."""
        if self.sigma is None:
            return None
        squares, freedom = self.own[size]
        return math.sqrt((squares + 4 * self.sigma**2) / (freedom + 4))

    def total_at(self, size: int) -> float:
        """Total at one size: that of its own seeds, steadied by the pooled one as if that were 2 more."""
        variance, seeds = self.own_total[size]
        return math.sqrt((seeds * variance + 2 * self.total**2) / (seeds + 2))


@dataclass(frozen=True, eq=False)
class SizeFit:
    """One size of one arm: its curve, the optimum, and what is wrong with it.

    means: (R, K) mean curves. optimum_se: log2, nan if the noise is unknown; the larger of what the resampled seeds
    and the residual noise say, for two seeds can agree by luck. weight: of the optimum in the drift. sigma: standard
    deviation of one run, seed offset removed. problems: sentences; a size with any does not enter the drift.
    """

    table: LossTable
    means: Array
    quadratic: QuadraticFit
    narrow: QuadraticFit
    optimum_se: float
    weight: float
    sigma: float | None
    problems: tuple[str, ...]

    @property
    def size(self) -> int:
        """Its value on the size axis."""
        return self.table.size

    @property
    def place(self) -> str:
        """Where it lies on the size axis, for a reader: "width 64"."""
        return self.table.place

    @property
    def optimum(self) -> float:
        """Best value of the hyperparameter, log2."""
        return float(self.quadratic.vertex[0])

    @property
    def best_losses(self) -> Array:
        """Loss at the optimum (R,), read off the narrow fit, which keeps closer to the points."""
        return self.narrow.at(self.quadratic.vertex)

    @property
    def curvature(self) -> float:
        """Nats per log2 squared."""
        return float(self.quadratic.c[0])

    @property
    def largest_stable(self) -> float:
        """log2 of the largest value below every divergence; the end of the grid without any, nan for none."""
        below = self.table.log2_value[self.table.log2_value < min(self.table.diverged, default=math.inf)]
        return float(below.max()) if len(below) else math.nan

    def loss_at(self, x: Array) -> Array:
        """Loss at log2 value `x` (R,): quadratic fit in its window, lines between the means outside, inf where runs diverge."""
        grid = self.table.log2_value
        right = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
        row = np.arange(len(x))
        t = np.clip((x - grid[right - 1]) / (grid[right] - grid[right - 1]), 0, 1)
        lines = (1 - t) * self.means[row, right - 1] + t * self.means[row, right]
        loss = np.where((x >= self.quadratic.left) & (x <= self.quadratic.right), self.quadratic.at(x), lines)
        return np.where(x >= min(self.table.diverged, default=math.inf), np.inf, loss)


def student_t(draws: Array, freedom: float, rng: np.random.Generator) -> Array:
    """Resamples (R,) spread about row 0, so that what was normal becomes Student's t.

    A variance that comes from 2 or 3 seeds per size is itself uncertain, and a normal interval would cover too little.
    """
    if not math.isfinite(freedom):
        return draws
    spread = np.sqrt(freedom / rng.chisquare(freedom, len(draws) - 1))
    return np.concatenate([draws[:1], draws[0] + (draws[1:] - draws[0]) * spread])


def variances(parts: Array, fits: Sequence[SizeFit], lone_freedom: float) -> tuple[float, float]:
    """Of the sum over sizes of `parts` (W, R): its variance, and Satterthwaite's term, variance**2 / freedom.

    Degrees of freedom: S - 1 for each size with seeds; sizes with a lone seed share those of the pooled noise.
    """
    each = parts[:, 1:].var(axis=1) if parts.shape[1] > 1 else np.zeros(len(parts))
    seeds = np.array([len(fit.table.filled) for fit in fits])
    lone = seeds == 1
    term = (each[~lone] ** 2 / (seeds[~lone] - 1)).sum() + each[lone].sum() ** 2 / lone_freedom
    return float(each.sum()), float(term)


def propagate(parts: Array, fits: Sequence[SizeFit], noise: Noise, rng: np.random.Generator) -> Array:
    """The sum over sizes of `parts` (W, R), which come from the optima: (R,), resamples spread out to Student's t."""
    variance, term = variances(parts, fits, noise.freedom)
    return student_t(parts.sum(axis=0), variance**2 / term if term else math.inf, rng)


def slope_weights(fits: Sequence[SizeFit]) -> Array:
    """Coefficients (W, 1) that turn optima into their weighted least-squares slope on log2 size."""
    doublings = np.log2([fit.size for fit in fits])
    weights = np.array([fit.weight for fit in fits])
    centred = doublings - np.average(doublings, weights=weights)
    return (weights * centred / (weights * centred**2).sum())[:, None]


def optima(fits: Sequence[SizeFit]) -> tuple[Array, Array]:
    """The optima (W, R) by the wide window, and by the narrow one, which is noisier and keeps closer to a skewed curve.

    The wide one's again where the points of the narrow one, few as they are, show no minimum.
    """
    closer = (fit.narrow if fit.narrow.resolved[0] else fit.quadratic for fit in fits)
    return np.array([fit.quadratic.vertex for fit in fits]), np.array([quadratic.vertex for quadratic in closer])


def fit_size(arm: str, table: LossTable, noise: Noise, thresholds: Thresholds, resamples: int, seed: int) -> SizeFit:
    """Fit one size and list what stands in the way of using it."""
    rng = np.random.default_rng([seed, table.size, *arm.encode()])
    sigma = noise.at(table.size)

    def fit(means: Array, window: float) -> QuadraticFit:
        return fit_quadratics(table.log2_value, means, window, thresholds.window_excess)

    if noise.sigma is None or sigma is None:
        means, error, weight = table.mean[None], math.nan, 1.0
    else:
        offset = math.sqrt(max(noise.total**2 - noise.sigma**2, 0.0))
        means = table.resample(resamples, noise.sigma, offset, rng)
        # A few seeds give a poor variance, and so poor weights; the residuals of all points near the optimum do not.
        gaussian = table.mean + sigma / np.sqrt(table.runs) * rng.standard_normal((500, len(table.log2_value)))
        error = float(fit(gaussian, thresholds.window).vertex.std())
        weight = 1 / (error**2 + thresholds.vertex_floor**2)
    quadratic = fit(means, thresholds.window)
    error = max(error, Estimate(quadratic.vertex).se)
    problems = tuple(f"{table.place}: {text}" for text in _obstacles(table, quadratic, thresholds))
    return SizeFit(table, means, quadratic, fit(means, thresholds.narrow_window), error, weight, sigma, problems)


def _obstacles(table: LossTable, quadratic: QuadraticFit, thresholds: Thresholds) -> Iterator[str]:
    """What keeps this optimum from being one, most basic first."""
    grid = table.log2_value
    lowest = float(quadratic.center[0])
    vertex = float(quadratic.vertex[0])
    cliff = min((x for x in table.diverged if x > lowest), default=math.inf)
    broken = [x for x in table.diverged if x < lowest]
    if broken:
        yield f"diverged at {value_text(broken[-1])}, left of the minimum at {value_text(lowest)}: not because it is large"
    elif lowest == grid[0]:
        yield f"minimum at the left edge of the grid: extend the sweep to {value_text(2 * grid[0] - grid[1])}"
    elif lowest == grid[-1] and cliff < math.inf:
        between = value_text((lowest + cliff) / 2)
        yield f"minimum at {value_text(lowest)}, next to the divergence at {value_text(cliff)}: add {between}"
    elif lowest == grid[-1]:
        yield f"minimum at the right edge of the grid: extend the sweep to {value_text(2 * grid[-1] - grid[-2])}"
    elif not quadratic.resolved[0]:
        yield f"no quadratic fit with a minimum inside the window around {value_text(lowest)}: add seeds or points there"
    elif cliff - vertex < (step := float(grid[np.searchsorted(grid, lowest) + 1]) - lowest) - 1e-6:
        where = f"less than a grid step ({step:g} in log2) right of the optimum at {value_text(vertex)}"
        yield f"diverges at {value_text(cliff)}, {where}: add points in between"
    elif len(quadratic.resolved) > 1 and (lost := 1 - quadratic.resolved[1:].mean()) > thresholds.max_unresolved:
        yield f"{lost:.0%} of the resamples have no minimum inside the grid: add seeds or extend the sweep"
