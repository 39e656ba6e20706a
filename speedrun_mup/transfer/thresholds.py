"""What decides a verdict."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Verdict(enum.StrEnum):
    """What the runs show."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """One for all: FAIL counts more than INCONCLUSIVE, and that more than PASS, which is that of none."""
    return max(verdicts, key=(Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.FAIL).index, default=Verdict.PASS)


@dataclass(frozen=True)
class Thresholds:
    """Every number that decides a verdict. Write them down before the runs; a change afterwards is post hoc.

    The window is as wide in log2 at every size, whatever the grid, so that the skew of the loss curve shifts every
    optimum alike and cancels in the drift. On a grid of factors of 2 it holds 5 points, the narrow one 3.
    """

    equivalence: float = 0.25  # log2 per doubling: the 90 % interval of the drift must lie inside +- this
    max_drift: float = 0.15  # log2 per doubling: the drift itself
    max_regret: float = 0.005  # nats lost at the largest size by keeping the base size's optimum ...
    regret_sigmas: float = 2.0  # ... or this many standard deviations of one run, whichever is more
    min_sizes: int = 3
    min_span: float = 4.0  # largest size over smallest
    window: float = 2.0  # log2: on either side of the lowest point that the fit takes
    narrow_window: float = 1.0  # the same for the check that the window does not matter
    window_excess: float = 0.05  # points this fraction above the lowest loss are treated as divergence, not fitted
    # log2 per doubling: narrow drift minus drift, unless noise (2 SE) explains it; nor may the narrow one exceed max_drift.
    max_window_shift: float = 0.15
    max_scatter: float = 0.25  # log2: one optimum's distance from the line, unless noise (3 SE) explains it
    max_unresolved: float = 0.05  # share of resamples without a minimum inside the grid
    vertex_floor: float = 0.05  # log2: no optimum is weighted as if it were known better than this
    larger_skip: float = 0.02  # fraction of training that "larger is better" leaves out
    larger_sigmas: float = 2.0
    max_violations: float = 0.05  # share of logged steps at which a larger model may be worse; noise alone makes 0.023

    def allowed_regret(self, sigma: float | None) -> float:
        """Nats. sigma: standard deviation of one run, None where it is unknown."""
        return max(self.max_regret, self.regret_sigmas * (sigma or 0.0))
