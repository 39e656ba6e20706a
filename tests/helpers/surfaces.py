"""Runs over several sizes whose exponents are planted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from speedrun_mup.transfer import Point

BASE = {"width": 64, "n_layer": 6, "batch_tokens": 1024, "tokens": 65536}
Doublings = Mapping[str, int]  # above the base; an axis that is not there is at the base


def design(names: Sequence[str]) -> list[Doublings]:
    """The base, one and two doublings along each axis, and one along each pair."""
    along = [{name: j} for name in names for j in (1, 2)]
    return [{}, *along, *({one: 1, other: 1} for one, other in itertools.combinations(names, 2))]


@dataclass(frozen=True)
class World:
    """What is true: where the optimum lies and what the loss is. coupling: 0 adds the axes, 1 multiplies them."""

    drifts: Mapping[str, float]
    exponents: Mapping[str, float] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)
    coupling: float = 0.5
    floor: float = 1.0
    optimum: float = 0.1
    curvature: float = 0.025
    sigma: float = 0.005
    offset: float = 0.01

    @staticmethod
    def drawn(names: Sequence[str], rng: np.random.Generator, **settings: float) -> World:
        """Another one each time."""
        return World(
            drifts={name: rng.uniform(-0.5, 0.5) for name in names},
            exponents={name: rng.uniform(0.1, 0.9) for name in names},
            gains={name: rng.uniform(0.05, 0.2) for name in names},
            coupling=rng.uniform(0, 1),
            floor=rng.uniform(0.5, 1.5),
            optimum=rng.uniform(-0.5, 0.5),
            curvature=rng.uniform(0.015, 0.04),
            **settings,
        )

    def best(self, at: Doublings) -> float:
        """Log2 of the best value."""
        return self.optimum + sum(drift * at.get(name, 0) for name, drift in self.drifts.items())

    def loss(self, at: Doublings) -> float:
        """At the best value."""
        product, coupling = 1.0, max(self.coupling, 1e-6) / (2.8 - self.floor)
        for name in self.drifts:
            p = self.exponents.get(name, 0.5)
            product *= 1 + coupling * self.gains.get(name, 0.1) * math.expm1(-p * at.get(name, 0) * math.log(2)) / p
        return 2.8 + (product - 1) / coupling

    def runs(
        self,
        places: Sequence[Doublings],
        rng: np.random.Generator,
        seeds: int | Sequence[int] = 2,
        grid: Sequence[float] = (-2, -1, 0, 1, 2),
    ) -> Iterator[Point]:
        """Runs of a grid around the whole number nearest to each place's best. seeds: for all places, or for each."""
        counts = [seeds] * len(places) if isinstance(seeds, int) else seeds
        for at, count in zip(places, counts, strict=True):
            sizes = {name: BASE[name] * 2 ** at.get(name, 0) for name in self.drifts}
            for seed in range(count):
                luck = self.offset * rng.standard_normal()
                for step in grid:
                    x = step + round(self.best(at))
                    loss = self.loss(at) + self.curvature * (x - self.best(at)) ** 2
                    yield Point(sizes, 2.0**x, seed, loss + luck + self.sigma * rng.standard_normal())
