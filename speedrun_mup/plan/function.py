"""Plans for a Python function: which cheap calls tune an expensive one, and what they predict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.plan.design import FULL, LEAN
from speedrun_mup.plan.proxies import Grid, Proxies, ProxyPrediction, choose_proxies
from speedrun_mup.transfer import Axes, TransferResult, loss_forecast


@dataclass(frozen=True)
class FunctionPlan:
    """The calls that find the best value for a target most exactly within a budget.

    Args:
        function: What is called.
        axes: What is scaled and what is tuned.
        target: The size that is tuned for.
        proxies: The smaller sizes, and what they cost.
        values: Of the hyperparameter.
        constants: Further arguments.
        cost: Of a run, if somebody said so.
    """

    function: Callable[..., Any]
    axes: Axes
    target: int
    proxies: Proxies
    values: tuple[float, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    cost: Callable[..., float] | None = None

    def summary(self) -> str:
        """For a terminal."""
        grid = ", ".join(f"{value:.4g}" for value in self.values)
        by = "" if self.cost else f", if it grows as {self.axes.size}^2; give cost= if not"
        lines = [
            f"target: {self.axes.at(self.target)}",
            f"proxies: {self.axes.plural} (seeds) {self.proxies.told()}; {self.axes.hyperparameter} {grid}"
            + (", then half steps around the best" if self.proxies.refine else ""),
            f"cost: about {self.proxies.share:.1%} of the target run{by}",
            f"the best {self.axes.label} will be known within a factor of about {2**self.proxies.error:.2f} (standard error)",
        ]
        return "\n".join(lines)

    __str__ = summary

    def run(self, out: str | Path = "plans/function", engine: str = "local", **options: Any) -> ProxyPrediction:
        """Make the runs, in the folder of a sweep, and predict. The same call again resumes.

        Args:
            out: The folder.
            engine: See `sweep`.
            options: For `sweep`: workers, progress, budget_minutes, loss.
        """
        from speedrun_mup.functions import sweep, transfer

        swept: Any = None
        for count in sorted(set(self.proxies.seeds), reverse=True):
            some = [size for size, seeds in zip(self.proxies.sizes, self.proxies.seeds, strict=True) if seeds == count]
            tuned = {self.axes.hyperparameter: list(self.values)}
            swept = sweep(
                *(self.function, {self.axes.size: some}),
                **{
                    **self.constants,
                    **tuned,
                    "seeds": count,
                    "refine": self.proxies.refine,
                    "out": out,
                    "engine": engine,
                    "cost": self.cost,
                    **options,
                },
            )
            if not swept.complete:
                raise ConfigError(
                    f"the plan is not done yet: {swept.result.left} runs left, {len(swept.failed)} failed"
                    + "".join(f"; {run}: {why}" for run, why in [*swept.failed.items()][:1])
                    + "; the same call again resumes"
                )
        result = transfer(Path(out))
        if not isinstance(result, TransferResult):
            raise ConfigError(f"{out} holds a sweep over several sizes; choose another folder")
        (arm,) = result.arms.values()
        return ProxyPrediction(result, loss_forecast(arm, self.target))


def choose(
    function: Callable[..., Any],
    axis: str,
    target: int,
    tuned: str,
    values: tuple[float, ...],
    constants: Mapping[str, Any],
    share: float,
    cost: Callable[..., float] | None,
    smallest: int,
) -> FunctionPlan:
    """The plan whose best value will be known most exactly at the target, among those within the budget.

    See `choose_proxies`; the grids are two around one value, or the values as they are.

    Args:
        function: What is called.
        axis: What is scaled; target: the size that is tuned for.
        tuned: The hyperparameter; values: its values, or the one in the middle of a grid.
        constants: Further arguments.
        share: The budget, over the target's cost.
        cost: Of a run with the same arguments; None: it grows as the square of the size.
        smallest: Size below which no run makes sense.

    Raises:
        NoPlanFits: None is within the budget.
        ConfigError: The target leaves no room for proxies, or its cost is none.
    """

    def price(size: int) -> float:
        if cost is None:
            return float(size) ** 2
        found = float(cost(**{**constants, axis: size, tuned: values[0], "seed": 0}))
        if not 0 < found < math.inf:
            raise ConfigError(f"cost: {found} at {axis} {size}; return a number above zero")
        return found

    middle = values[0]
    grids: tuple[Grid, ...] = (FULL, LEAN)
    if len(values) > 1:
        grids = ((tuple(math.log2(value / middle) for value in values), ()),)
    chosen = choose_proxies(axis, target, price, share, smallest, grids)
    on_grid = values if len(values) > 1 else tuple(float(f"{middle * 2.0**at:.6g}") for at in chosen.grid)
    return FunctionPlan(function, Axes(axis, tuned), target, chosen, on_grid, constants, cost)
