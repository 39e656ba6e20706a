"""Is a wider model better at every step of training?"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speedrun_mup.transfer.fits import Array
from speedrun_mup.transfer.runs import CurveKey, TransferError, lr_text
from speedrun_mup.transfer.thresholds import Thresholds, Verdict


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
        text = f"wider is better at {lr_text(self.log2_lr)}: {self.verdict}, {self.share:.1%} of steps violate it"
        if self.where:
            narrow, wide, step = self.where
            text += f", at worst by {self.largest:.3f} at step {step} (width {wide} against {narrow})"
        return text


def wider_is_better(
    curves: Mapping[CurveKey, Array], log2_lr: float, thresholds: Thresholds | None = None
) -> WiderIsBetter:
    """Compare the training curves of neighbouring widths of one arm, at the common learning rate nearest `log2_lr`.

    curves: (arm, width, lr, seed) -> (T, 2) step and training loss; same seed, same batches. The gap is the mean over
    common seeds. Its noise has two parts: that of a step, by the median of the jumps between neighbouring steps, so that
    a trend does not count; and that of a whole run, by what separates the seeds of a pair, pooled over pairs, for two runs
    of one width stay apart as well (with two seeds it is itself so unsure that up to a quarter of equal models fail, with
    noise between runs alone). With single seeds the second is unknown, and only a model that diverges can fail.
    Raises TransferError if two neighbouring widths have nothing in common.
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
    widths = sorted(rates)
    pairs = [(narrow, wide, *_gap(table[narrow, at], table[wide, at])) for narrow, wide in itertools.pairwise(widths)]
    between, known = _between_seeds([gaps for *_, gaps in pairs])
    total = violations = diverged = 0
    largest, where = 0.0, None
    for narrow, wide, steps, gap, gaps in pairs:
        if len(steps) < 3:
            raise TransferError(f"training curves: widths {narrow} and {wide} share fewer than 3 steps of one seed")
        jumps = np.abs(np.diff(gap[np.isfinite(gap)]))
        step_noise = float(np.median(jumps)) / (0.6745 * math.sqrt(2)) if len(jumps) else 0.0
        late = steps > thresholds.wider_skip * steps[-1]
        steps, gap = steps[late], gap[late]
        worse = gap > thresholds.wider_sigmas * math.hypot(step_noise, between / math.sqrt(len(gaps)))
        total, violations = total + len(worse), violations + int(worse.sum())
        diverged += int(np.isinf(gap[worse]).sum())
        if worse.any() and gap.max() > largest:
            largest, where = float(gap.max()), (narrow, wide, int(steps[gap.argmax()]))
    share, surely = violations / total, (violations if known else diverged) / total
    if share <= thresholds.max_violations:
        verdict = Verdict.PASS
    else:
        verdict = Verdict.FAIL if surely > thresholds.max_violations else Verdict.INCONCLUSIVE
    return WiderIsBetter(at, share, largest, where, verdict)


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


def _gap(narrow: Mapping[int, Array], wide: Mapping[int, Array]) -> tuple[Array, Array, Array]:
    """Steps that all common seeds logged (T,); the wide model's loss minus the narrow one's there, of the mean over seeds
    (T,) and of each seed (S, T).

    A loss that is no number counts as infinite; where both have one, neither is worse.
    """
    seeds = sorted(set(narrow) & set(wide))
    if not seeds:
        return np.zeros(0), np.zeros(0), np.zeros((0, 0))
    logged = [set(curve[:, 0]) for side in (narrow, wide) for curve in (side[seed] for seed in seeds)]
    steps = np.array(sorted(set.intersection(*logged)))
    loss = [[side[seed][np.isin(side[seed][:, 0], steps), 1] for seed in seeds] for side in (narrow, wide)]
    before, after = np.nan_to_num(loss, nan=np.inf, posinf=np.inf)

    def difference(one: Array, other: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(one - other, nan=0.0, posinf=np.inf, neginf=-np.inf)

    return steps, difference(after.mean(axis=0), before.mean(axis=0)), difference(after, before)
