"""One width: its table of losses, the parabola near the minimum, the optimum, and the noise of all that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from speedrun_mup.transfer.runs import Run, TransferError, lr_text
from speedrun_mup.transfer.thresholds import Thresholds

Array = NDArray[np.float64]
MOST_SEEDS, MOST_POINTS = 100, 200  # at one width


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
    points; one diverged seed makes the point unstable, since the mean of the survivors would flatter it. seeds: of the rows.
    """

    width: int
    log2_lr: Array
    losses: Array
    filled: Array
    diverged: tuple[float, ...]
    seeds: tuple[int, ...] = ()

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


def table_of(width: int, runs: Sequence[Run], initial_loss: float) -> Cells | str:
    """One width's runs as a table, or the sentence that says why they make none."""
    placed = [(run.log2_lr, run.seed, run.loss) for run in runs]
    diverged = {at for at, _, loss in placed if not (math.isfinite(loss) and loss < initial_loss)}
    stable = [run for run in placed if run[0] not in diverged]
    grid, seeds = sorted({at for at, _, _ in stable}), sorted({seed for _, seed, _ in stable})
    if len(grid) < 3:
        downwards = " downwards" if diverged else ""
        return f"width {width}: {len(grid)} stable points, at least 3 are needed; extend the sweep{downwards}"
    column, row = ({value: number for number, value in enumerate(values)} for values in (grid, seeds))
    if not _connected(len(seeds), len(grid), ((row[seed], column[at]) for at, seed, _ in stable)):
        return f"width {width}: its seeds share too few points to be compared; run one seed on the whole grid"
    if len(seeds) > MOST_SEEDS or len(grid) > MOST_POINTS:
        have = f"{len(seeds)} seeds and {len(grid)} learning rates"
        return f"width {width}: {have}; give at most {MOST_SEEDS} and {MOST_POINTS}"
    losses = np.full((len(seeds), len(grid)), np.nan)
    for at, seed, loss in stable:
        losses[row[seed], column[at]] = loss
    return Cells(width, np.array(grid), losses, _filled(losses), tuple(sorted(diverged)), tuple(seeds))


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
    """`losses` (S, K) with gaps filled from the additive fit of seed and learning-rate effects."""
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

    freedom: degrees of freedom behind sigma; total_freedom: behind total, one for each seed of a width beyond its first.
    own: width -> (sum of squares, degrees of freedom); own_total: width -> (variance with the offset, seeds beyond the
    first).
    """

    sigma: float | None
    total: float
    freedom: float
    total_freedom: float
    own: dict[int, tuple[float, float]]
    own_total: dict[int, tuple[float, int]]

    @staticmethod
    def of(arm: Sequence[Cells], everywhere: Sequence[Cells], given: float | None, thresholds: Thresholds) -> Noise:
        """Pooled over the widths of the arm; over all arms if this one has no replicates; `given` if none has.

        Raises TransferError for a `given` that would overrule replicates, or is no standard deviation.
        """
        if given is not None and not 0 < given < math.inf:
            raise TransferError(f"--sigma {given:g}: must be positive and finite: a standard deviation in nats")

        def residuals(some: Sequence[Cells]) -> Array:
            rows = [cells.noise(thresholds.window, thresholds.window_excess) for cells in some]
            return np.array(rows).reshape(-1, 2, 2)

        mine = residuals(arm)
        own = {cells.width: (float(row[0, 0]), float(row[1, 0])) for cells, row in zip(arm, mine)}
        own_total = {
            cells.width: (float(row[0, 1] / max(row[1, 1], 1)), len(cells.filled) - 1) for cells, row in zip(arm, mine)
        }
        source, rows = (arm, mine) if mine[:, 1, 0].any() else (everywhere, residuals(everywhere))
        squares, freedom = rows.sum(axis=0)
        if freedom[0] == 0:
            return Noise(given, given or 0.0, math.inf, math.inf, own, own_total)
        pooled, total = (float(value) for value in np.sqrt(squares / freedom))
        if pooled < 1e-9 * max(abs(float(cells.mean.min())) for cells in source):
            raise TransferError("all seeds have the same losses near the optimum; give more digits")
        if given is not None:
            raise TransferError(f"--sigma {given:g}: runs with several seeds tell the noise already; leave it out")
        seeds = sum(len(cells.filled) - 1 for cells in source)
        return Noise(pooled, max(total, pooled), float(freedom[0]), float(seeds), own, own_total)

    def at(self, width: int) -> float | None:
        """Sigma at one width: its own residuals, steadied by the pooled sigma as if that were 4 more."""
        if self.sigma is None:
            return None
        squares, freedom = self.own[width]
        return math.sqrt((squares + 4 * self.sigma**2) / (freedom + 4))

    def total_at(self, width: int) -> float:
        """Total at one width: that of its own seeds, steadied by the pooled one as if that were 2 more."""
        variance, seeds = self.own_total[width]
        return math.sqrt((seeds * variance + 2 * self.total**2) / (seeds + 2))


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


def student_t(draws: Array, freedom: float, rng: np.random.Generator) -> Array:
    """Resamples (R,) spread about row 0, so that what was normal becomes Student's t.

    A variance that comes from 2 or 3 seeds per width is itself uncertain, and a normal interval would cover too little.
    """
    if not math.isfinite(freedom):
        return draws
    spread = np.sqrt(freedom / rng.chisquare(freedom, len(draws) - 1))
    return np.concatenate([draws[:1], draws[0] + (draws[1:] - draws[0]) * spread])


def variances(parts: Array, fits: Sequence[WidthFit], lone_freedom: float) -> tuple[float, float]:
    """Of the sum over widths of `parts` (W, R): its variance, and Satterthwaite's term, variance**2 / freedom.

    Degrees of freedom: S - 1 for each width with seeds; widths with a lone seed share those of the pooled noise.
    """
    each = parts[:, 1:].var(axis=1) if parts.shape[1] > 1 else np.zeros(len(parts))
    seeds = np.array([len(fit.cells.filled) for fit in fits])
    lone = seeds == 1
    term = (each[~lone] ** 2 / (seeds[~lone] - 1)).sum() + each[lone].sum() ** 2 / lone_freedom
    return float(each.sum()), float(term)


def summed(parts: Array, fits: Sequence[WidthFit], noise: Noise, rng: np.random.Generator) -> Array:
    """The sum over widths of `parts` (W, R), which come from the optima: (R,), resamples spread out to Student's t."""
    variance, term = variances(parts, fits, noise.freedom)
    return student_t(parts.sum(axis=0), variance**2 / term if term else math.inf, rng)


def drift_line(fits: Sequence[WidthFit]) -> Array:
    """Coefficients (W, 1) that turn optima into their weighted least-squares slope on log2 width."""
    doublings = np.log2([fit.width for fit in fits])
    weights = np.array([fit.weight for fit in fits])
    centred = doublings - np.average(doublings, weights=weights)
    return (weights * centred / (weights * centred**2).sum())[:, None]


def vertices(fits: Sequence[WidthFit]) -> tuple[Array, Array]:
    """The optima (W, R) by the wide window, and by the narrow one, which is noisier and keeps closer to a skewed curve.

    The wide one's again where the points of the narrow one, few as they are, show no minimum.
    """
    closer = (fit.narrow if fit.narrow.resolved[0] else fit.bowls for fit in fits)
    return np.array([fit.bowls.vertex for fit in fits]), np.array([bowls.vertex for bowls in closer])


def fit_width(arm: str, cells: Cells, noise: Noise, thresholds: Thresholds, resamples: int, seed: int) -> WidthFit:
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
        yield f"diverged at {lr_text(broken[-1])}, left of the minimum at {lr_text(lowest)}: not because it is large"
    elif lowest == grid[0]:
        yield f"minimum at the left edge of the grid: extend the sweep to {lr_text(2 * grid[0] - grid[1])}"
    elif lowest == grid[-1] and cliff < math.inf:
        yield f"minimum at {lr_text(lowest)}, next to the divergence at {lr_text(cliff)}: add {lr_text((lowest + cliff) / 2)}"
    elif lowest == grid[-1]:
        yield f"minimum at the right edge of the grid: extend the sweep to {lr_text(2 * grid[-1] - grid[-2])}"
    elif not bowls.resolved[0]:
        yield f"no parabola with a minimum inside the window around {lr_text(lowest)}: add seeds or points there"
    elif cliff - vertex < (step := float(grid[np.searchsorted(grid, lowest) + 1]) - lowest) - 1e-6:
        where = f"less than a grid step ({step:g} octaves) right of the optimum at {lr_text(vertex)}"
        yield f"diverges at {lr_text(cliff)}, {where}: add points in between"
    elif len(bowls.resolved) > 1 and (lost := 1 - bowls.resolved[1:].mean()) > thresholds.max_unresolved:
        yield f"{lost:.0%} of the resamples have no minimum inside the grid: add seeds or extend the sweep"
