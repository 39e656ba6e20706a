"""Which points to run next: where a grid grows and where it is refined."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

SAME = 1e-5  # log2: closer points are one
MAX_EXTENSION = 3.0  # log2: beyond either end of the grid that was asked for


def propose_points(losses: Mapping[float, float], grid: Sequence[float], refine: bool = True) -> set[float]:
    """Points still to be run at one size, as log2 factors.

    A minimum less than 1 from an end asks for one point more there, up to MAX_EXTENSION beyond `grid`. Any other asks, if
    `refine`, for the half steps around it, which are those around the three lowest points of a loss curve on a grid of
    whole steps; but for none at or beyond the first divergence. Without `refine` it asks for the step beyond the better of
    its two neighbours: of three points the minimum may lie midway between two, and then noise moves it out of their reach.
    Next to a divergence it asks for the half step before that.

    Args:
        losses: log2 factor -> loss of all points so far, not finite where it diverged.
        grid: What was asked for.
        refine: Whether to add half steps.
    """
    stable = {at: loss for at, loss in losses.items() if math.isfinite(loss)}
    left, right = min(losses, default=0.0), max(losses, default=0.0)
    if not losses:
        wanted = set()
    elif not stable:
        wanted = {left - 1}
    else:
        best = min(stable, key=lambda at: (stable[at], at))
        if best - left < 1:
            wanted = {left - 1}
        elif right - best < 1 and right in stable:
            wanted = {right + 1}
        elif refine:
            end = min((at for at in losses if at not in stable), default=right)
            wanted = {at for at in (best + halves / 2 for halves in range(-3, 4)) if left < at < end}
        elif (cliff := min((at for at in losses if at not in stable and at > best), default=math.inf)) <= best + 1:
            wanted = {best + 0.5} if best + 0.5 < cliff else set()
        else:
            to_the_right = stable.get(best + 1, math.inf) < stable.get(best - 1, math.inf)
            wanted = {best + (2 if to_the_right else -2)}
    low, high = min(grid) - MAX_EXTENSION, max(grid) + MAX_EXTENSION
    there = [*losses]  # sums of values that are no powers of 2 may differ in their last digit
    return {at for at in wanted if low <= at <= high and all(abs(at - other) > SAME for other in there)}
