"""Is a larger model better at every step of training?"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speedrun_mup.transfer.axes import Axes
from speedrun_mup.transfer.fits import Array
from speedrun_mup.transfer.points import CurveKey, TransferError, value_text
from speedrun_mup.transfer.thresholds import Thresholds, Verdict


@dataclass(frozen=True)
class LargerIsBetter:
    """Whether a larger model is at least as good at every step, at one value of the hyperparameter and on the same data.

    share: of logged steps, over all neighbouring sizes, at which the larger model is worse by more than the noise.
    worst: the largest excess in nats; where: its (small, large, step).
    """

    axes: Axes
    log2_value: float
    share: float
    worst: float
    where: tuple[int, int, int] | None
    verdict: Verdict

    def __str__(self) -> str:
        better = f"{self.axes.scale.larger} is better at {value_text(self.log2_value)}"
        text = f"{better}: {self.verdict}, {self.share:.1%} of steps violate it"
        if self.where:
            small, large, step = self.where
            text += f", at worst by {self.worst:.3f} at step {step} ({self.axes.at(large)} against {small})"
        return text


def larger_is_better(
    curves: Mapping[CurveKey, Array],
    log2_value: float,
    axes: Axes | None = None,
    thresholds: Thresholds | None = None,
) -> LargerIsBetter:
    """Compare the training curves of neighbouring sizes of one arm, at the common value nearest `log2_value`.

    curves: (arm, size, value, seed) -> (T, 2) step and training loss; same seed, same batches. The gap is the mean over
    common seeds. Its noise has two parts: that of a step, by the median of the jumps between neighbouring steps, so that
    a trend does not count; and that of a whole run, by what separates the seeds of a pair, pooled over pairs, for two runs
    of one size stay apart as well (with two seeds it is itself so unsure that up to a quarter of equal models fail, with
    noise between runs alone). With single seeds the second is unknown, and only a model that diverges can fail.
    Raises TransferError if two neighbouring sizes have nothing in common.
    """
    axes, thresholds = axes or Axes(), thresholds or Thresholds()
    values: dict[int, set[float]] = defaultdict(set)
    table: dict[tuple[int, float], dict[int, Array]] = defaultdict(dict)
    for (_, size, value, seed), curve in curves.items():
        at = round(math.log2(value), 6)
        values[size].add(at)
        table[size, at][seed] = np.asarray(curve, dtype=float)
    shared = set.intersection(*values.values())
    if len(values) < 2 or not shared:
        why = f"no {axes.label} that two or more {axes.plural} share; log the same ones"
        raise TransferError(f"training curves: {why}")
    at = min(shared, key=lambda value: (abs(value - log2_value), value))
    sizes = sorted(values)
    pairs = [(small, large, *_gap(table[small, at], table[large, at])) for small, large in itertools.pairwise(sizes)]
    between, known = _between_seeds([gaps for *_, gaps in pairs])
    total = violations = diverged = 0
    worst, where = 0.0, None
    for small, large, steps, gap, gaps in pairs:
        if len(steps) < 3:
            raise TransferError(
                f"training curves: {axes.plural} {small} and {large} share fewer than 3 steps of one seed"
            )
        jumps = np.abs(np.diff(gap[np.isfinite(gap)]))
        step_noise = float(np.median(jumps)) / (0.6745 * math.sqrt(2)) if len(jumps) else 0.0
        late = steps > thresholds.larger_skip * steps[-1]
        steps, gap = steps[late], gap[late]
        worse = gap > thresholds.larger_sigmas * math.hypot(step_noise, between / math.sqrt(len(gaps)))
        total, violations = total + len(worse), violations + int(worse.sum())
        diverged += int(np.isinf(gap[worse]).sum())
        if worse.any() and gap.max() > worst:
            worst, where = float(gap.max()), (small, large, int(steps[gap.argmax()]))
    share, surely = violations / total, (violations if known else diverged) / total
    if share <= thresholds.max_violations:
        verdict = Verdict.PASS
    else:
        verdict = Verdict.FAIL if surely > thresholds.max_violations else Verdict.INCONCLUSIVE
    return LargerIsBetter(axes, at, share, worst, where, verdict)


def _between_seeds(pairs: Sequence[Array]) -> tuple[float, bool]:
    """Standard deviation of one seed's gap about those of its pair (S, T), pooled; and whether any pair shows it.

    A seed's gap is its median over the steps, which neither their noise nor the beginning of training moves.
    """
    squares = freedom = 0.0
    for gaps in pairs:
        finite = gaps[:, np.isfinite(gaps).all(axis=0)]
        if len(gaps) > 1 and finite.size:
            of_seed = np.median(finite, axis=1)
            squares += ((of_seed - of_seed.mean()) ** 2).sum()
            freedom += len(gaps) - 1
    return (math.sqrt(squares / freedom), True) if freedom else (0.0, False)


def _gap(small: Mapping[int, Array], large: Mapping[int, Array]) -> tuple[Array, Array, Array]:
    """Steps that all common seeds logged (T,); the large model's loss minus the small one's there, of the mean over seeds
    (T,) and of each seed (S, T).

    A loss that is no number counts as infinite; where both have one, neither is worse.
    """
    seeds = sorted(set(small) & set(large))
    if not seeds:
        return np.zeros(0), np.zeros(0), np.zeros((0, 0))
    logged = [set(curve[:, 0]) for side in (small, large) for curve in (side[seed] for seed in seeds)]
    steps = np.array(sorted(set.intersection(*logged)))
    loss = [[side[seed][np.isin(side[seed][:, 0], steps), 1] for seed in seeds] for side in (small, large)]
    before, after = np.nan_to_num(loss, nan=np.inf, posinf=np.inf)

    def difference(one: Array, other: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(one - other, nan=0.0, posinf=np.inf, neginf=-np.inf)

    return steps, difference(after.mean(axis=0), before.mean(axis=0)), difference(after, before)
