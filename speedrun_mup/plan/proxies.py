"""Which small runs tune a large one most exactly within a share of its cost, whatever trains them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.plan.design import FULL, LEAN, NoPlanFits, expected_lr_error, ladders
from speedrun_mup.transfer import Forecast, Thresholds, TransferResult

Grid = tuple[tuple[float, ...], tuple[float, ...]]  # log2 factors, and those that are added around the best


@dataclass(frozen=True)
class Proxies:
    """The small runs.

    Args:
        sizes: Of the proxies, smallest first; seeds: of each.
        grid: Factors on the hyperparameter, log2.
        refine: Whether half steps are added around the best.
        share: What they cost, over the target's cost.
        error: Expected standard error of the target's best value, log2.
    """

    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    grid: tuple[float, ...]
    refine: bool
    share: float
    error: float

    def told(self) -> str:
        """Sizes and seeds, for a terminal."""
        return ", ".join(f"{size} ({seeds})" for size, seeds in zip(self.sizes, self.seeds, strict=True))


@dataclass(frozen=True)
class ProxyPrediction:
    """What the small runs say: the verdict on transfer, and loss and best value at the target, with intervals."""

    transfer: TransferResult
    forecast: Forecast

    @property
    def value(self) -> float:
        """What to give the target."""
        return 2.0**self.forecast.log2_value.value

    def summary(self) -> str:
        """For a terminal."""
        return f"{self.transfer.verdict}: {self.forecast}"

    __str__ = summary


def halves_of(axis: str, target: int, smallest: int) -> list[int]:
    """Halves of the target, halves of these and so on, smallest first. Raises ConfigError for too few for a verdict."""
    sizes = [target >> halvings for halvings in range(1, target.bit_length())]
    sizes = sorted(size for number, size in enumerate(sizes, 1) if size << number == target and size >= smallest)
    if len(sizes) < Thresholds.min_sizes:
        need = smallest * 2**Thresholds.min_sizes
        raise ConfigError(
            f"{axis} {target} has {len(sizes)} halves from {smallest} up, {Thresholds.min_sizes} are needed; plan for {need}"
        )
    return sizes


def choose_proxies(
    axis: str,
    target: int,
    price: Callable[[int], float],
    share: float,
    smallest: int = 1,
    grids: Sequence[Grid] = (FULL, LEAN),
) -> Proxies:
    """The proxies whose best value will be known most exactly at the target, among those within the budget.

    Considered are halves of the target, halves of these and so on, at least as many as a verdict needs, with few seeds or many,
    and each of the grids.

    Args:
        axis: What is scaled; target: the size that is tuned for.
        price: Of one run at a size, in any unit.
        share: The budget, over the target's price.
        smallest: Size below which no run makes sense.
        grids: To choose from.

    Raises:
        NoPlanFits: None is within the budget.
        ConfigError: The target leaves no room for proxies.
    """
    whole, found = price(target), []
    for some, seeds in ladders(halves_of(axis, target, smallest)):
        for grid, added in grids:
            runs = len(grid) + len(added)
            paid = sum(count * runs * price(size) for size, count in zip(some, seeds, strict=True)) / whole
            error = expected_lr_error(some, seeds, grid + added, target)
            found.append(Proxies(some, seeds, grid, grid == FULL[0], paid, error))
    fitting = [proxies for proxies in found if proxies.share <= share]
    if not fitting:
        least = min(proxies.share for proxies in found)
        enough = f"{math.ceil(1000 * least) / 10:g}%"
        raise NoPlanFits(
            f"no plan fits {100 * share:.3g}% of the target's cost: the smallest takes {least:.1%}; give a budget of {enough}",
            enough,
        )
    return min(fitting, key=lambda proxies: (proxies.error, proxies.share))
