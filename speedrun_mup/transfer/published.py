"""What the published experiments of this recipe measured, as priors for its next sweep (docs/experiments, all arms that are no
controls; `tests/test_published.py` computes them from the tables).

They narrow forecasts of plans, which train the same recipe. A table of other runs gets none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from speedrun_mup.transfer.law import Prior


@dataclass(frozen=True)
class Published:
    """Priors of a forecast.

    Args:
        exponents: Of the loss in a size, by its name.
        noise: Standard deviation of the loss between seeds, relative to the loss.
        freedom: How many degrees of freedom that counts for.
    """

    exponents: Mapping[str, Prior]
    noise: float
    freedom: float


# Widths 32 to 256, 96 steps. Eight sweeps: mean 0.45, standard error 0.13, and no scatter beyond their errors; a sweep of
# another length or corpus may differ by more, so the prior is wider than that.
WIDTH = Prior(0.45, 0.2)
# Steps 64 to 512 at width 64 (docs/experiments/horizon.md): drift -0.33 (90 % -0.47 to -0.24) per doubling, exponent of the loss
# 0.07 (-0.05 to 0.19). One sweep of one width: both are wider here than its own intervals.
LENGTH_DRIFT, LENGTH = Prior(-0.32, 0.1), Prior(0.07, 0.15)
# Seeds that draw the order of the data too differ by about twice as much. Both may be off by a factor of 1.4 elsewhere.
FREEDOM = 4.0
BY_DATA_ORDER = {
    "record": Published({"width": WIDTH}, 0.0048, FREEDOM),
    "shuffled": Published({"width": WIDTH}, 0.0091, FREEDOM),
}
