"""How long runs take, learnt from finished ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.sweep.result import RunResult
from speedrun_mup.transfer.axes import Sizes


class CostModel:
    """How long a run takes in one worker, learnt from finished ones: steps by their FLOPs, and what comes with a run.

    What comes with a run is setting up and validation. What is known of the nearest size counts.
    """

    def __init__(self, results: Iterable[RunResult] = ()):
        self._known: dict[tuple[tuple[str, int], ...], _Spent] = {}
        for result in results:
            self.learn(result)

    @property
    def known(self) -> bool:
        """Whether there is anything to go by."""
        return bool(self._known)

    def learn(self, result: RunResult) -> None:
        """Count a finished run."""
        if result.flops or result.train_s:
            spent = self._known.setdefault(tuple(result.sizes.items()), _Spent())
            spent.flops += result.flops
            spent.train_s += result.train_s
            spent.other_s += result.seconds - result.train_s
            spent.runs += 1

    def seconds(self, size: int | Sizes, flops: float) -> float:
        """What a run will take; 0 while nothing is known. size: on all axes, or on the first."""
        if not self.known:
            return 0.0
        spent = self._nearest(size)
        if not spent.flops:
            return (spent.other_s + spent.train_s) / spent.runs
        return spent.other_s / spent.runs + flops * spent.train_s / spent.flops

    def flops_per_s(self, size: int | Sizes) -> float:
        """Training speed of one worker. Raises ConfigError while nothing is known."""
        if not self.known:
            raise ConfigError("no run has finished, so nothing is known about speed; run one first")
        return self._nearest(size).flops / self._nearest(size).train_s

    def _nearest(self, size: int | Sizes) -> _Spent:
        def distance(place: tuple[tuple[str, int], ...]) -> float:
            asked = size if isinstance(size, Mapping) else {place[0][0]: size}
            return sum(abs(math.log(value / asked[name])) for name, value in place if name in asked)

        return self._known[min(self._known, key=distance)]


@dataclass
class _Spent:
    """Sums over runs of one size."""

    flops: float = 0.0
    train_s: float = 0.0
    other_s: float = 0.0
    runs: int = 0
