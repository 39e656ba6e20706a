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
# Seeds that draw the order of the data too differ by about twice as much. Both may be off by a factor of 1.4 elsewhere.
FREEDOM = 4.0
BY_DATA_ORDER = {
    "record": Published({"width": WIDTH}, 0.0048, FREEDOM),
    "shuffled": Published({"width": WIDTH}, 0.0091, FREEDOM),
}
