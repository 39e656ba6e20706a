"""What is true of any sweep, whatever trains its runs: the sizes, the grid, the seeds, and one run as a worker gets it.

`Sweep` and `RunSpec` train this package's model; `CommandSweep` and `CommandRun` start a program of the user's.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from speedrun_mup.core.errors import ConfigError, UserError, in_a_line
from speedrun_mup.sweep.arms import Arm
from speedrun_mup.sweep.result import MOST_DOUBLINGS, Failure, Place, RunResult
from speedrun_mup.transfer import Axes
from speedrun_mup.transfer.axes import Sizes, confounded, told_sizes

MOST_SEEDS = 100


@dataclass(frozen=True)
class AnyRun(ABC):
    """One run: its place in the table.

    Args:
        sizes: Name of a size axis of the sweep -> value.
        log2_factor: On the hyperparameter.
    """

    arm: str
    sizes: Mapping[str, int]
    log2_factor: float
    seed: int

    def __str__(self) -> str:
        return f"{self.arm} {told_sizes(self.sizes)} 2^{self.log2_factor:g} seed {self.seed}"

    @property
    def size(self) -> int:
        """Its place on the first size axis of the sweep."""
        return next(iter(self.sizes.values()))

    @property
    def place(self) -> Place:
        """Its place on all size axes of the sweep."""
        return tuple(self.sizes.values())

    @functools.cached_property
    @abstractmethod
    def id(self) -> str:
        """16 hex digits, the same wherever it runs: a hash of what it computes."""

    @functools.cached_property
    @abstractmethod
    def flops(self) -> float:
        """What training it takes; 0 where that is not known."""

    @abstractmethod
    def run(self, scratch: Path) -> RunResult | Failure:
        """Make it, in a folder of its own inside `scratch`."""


def run_safely(spec: AnyRun, scratch: Path) -> RunResult | Failure:
    """Make a run, with any exception as a Failure."""
    try:
        return spec.run(scratch)
    except UserError as fault:
        return Failure(str(fault))
    except Exception as fault:
        return Failure(in_a_line(fault))


@dataclass(frozen=True)
class AnySweep(ABC):
    """Which runs to make.

    Args:
        base: What all runs have in common.
        sizes: Values of the size axis that `axes` names; or, for several axes at once, one mapping of name to value for each
            size of run, all with the same names in the same order: ({"width": 64, "n_layer": 6}, {"width": 64, "n_layer": 12},
            {"width": 128, "n_layer": 6}). Any set of sizes will do that tells its axes apart, not only full grids (`grid_of`).
        log2_factors: The grid: powers of two on the hyperparameter.
        axes: The hyperparameter; and the size, where there is one axis.
        adaptive: Extend the grid where the minimum turns out to be at its edge.
        refine: Where it is not, add the points halfway between those around the minimum, else one point on its better side.

    Raises:
        ConfigError: For a value that no run can have.
    """

    base: Any
    sizes: tuple[int | Sizes, ...]
    arms: tuple[Arm, ...]
    log2_factors: tuple[float, ...] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    axes: Axes = Axes("width", "lr_scale")
    adaptive: bool = True
    refine: bool = True

    trainer: ClassVar[str] = ""  # what trains its runs, in sweep.json; nothing for this package's model

    def __post_init__(self) -> None:
        names = [tuple(size) for size in self.sizes if isinstance(size, Mapping)]
        if names and (len(names) < len(self.sizes) or len(set(names)) > 1 or not names[0]):
            raise ConfigError("sizes: give every run the same axes in the same order, such as width=64, n_layer=6")
        if problem := confounded(self.sized):
            raise ConfigError(f"sizes: {problem}")
        plural = self.axes.plural if len(self.size_names) == 1 else "sizes"
        named = {plural: self.places, "arms": [arm.name for arm in self.arms]}
        for name, values in {**named, "--octaves": self.log2_factors, "seeds": self.seeds}.items():
            if not values or len(set(values)) < len(values):
                shown = ",".join(str(value[0] if isinstance(value, tuple) else value) for value in values)
                raise ConfigError(f"{name}={shown}: name at least one, and none twice")
        if len(self.seeds) > MOST_SEEDS:
            raise ConfigError(f"{len(self.seeds)} seeds: give at most {MOST_SEEDS}")
        if far := [at for at in self.log2_factors if not abs(at) <= MOST_DOUBLINGS]:
            limits = f"from -{MOST_DOUBLINGS:g} to {MOST_DOUBLINGS:g}"
            raise ConfigError(
                f"--octaves={far[0]:g} must be {limits}: the log2 of a factor on {self.axes.hyperparameter}"
            )

    @property
    def size_names(self) -> tuple[str, ...]:
        """The size axes."""
        first = self.sizes[0] if self.sizes else 0
        return tuple(first) if isinstance(first, Mapping) else (self.axes.size,)

    @functools.cached_property
    def sized(self) -> tuple[Sizes, ...]:
        """Every size of run: name of an axis -> value."""
        return tuple(dict(size) if isinstance(size, Mapping) else {self.axes.size: size} for size in self.sizes)

    @property
    def places(self) -> tuple[Place, ...]:
        """The same, the values alone."""
        return tuple(tuple(sizes.values()) for sizes in self.sized)

    @functools.cached_property
    def predicted(self) -> dict[str, dict[str, float]]:
        """Arm -> size axis -> the drift that it must show; only arms of which that is known for this sweep."""
        return {}

    @abstractmethod
    def told(self) -> Iterator[str]:
        """What varies and what stays, for the beginning of a sweep, a line each."""

    @abstractmethod
    def check(self) -> Any:
        """What its runs read, for `definition` and `run_spec`. Raises ConfigError for a run that nothing could make."""

    @abstractmethod
    def definition(self, data: Any, known: Mapping[str, Any]) -> dict[str, Any]:
        """What its runs have in common, for sweep.json.

        data: from `check`. known: what the folder has of earlier sweeps, if anything.
        """

    def as_recorded(self, data: Any, recorded: Mapping[str, Any]) -> Any:
        """`data` as the folder calls them. recorded: what sweep.json has now."""
        return data

    @abstractmethod
    def seeds_draw(self) -> str:
        """What differs between runs with different seeds."""

    @abstractmethod
    def source(self) -> str:
        """A hash of the code that its runs run."""

    @abstractmethod
    def run_spec(self, arm: Arm, sizes: int | Sizes, log2_factor: float, seed: int, data: Any) -> AnyRun:
        """One run. data: from `check`."""

    def run_specs(self, points: Mapping[tuple[str, Place], Iterable[float]], data: Any) -> list[AnyRun]:
        """The runs of all seeds at `points`: (arm, place) -> log2 factors."""
        return [
            self.run_spec(arm, sizes, log2_factor, seed, data)
            for arm in self.arms
            for sizes in self.sized
            for log2_factor in sorted(points[arm.name, tuple(sizes.values())])
            for seed in self.seeds
        ]


def grid_of(values: Mapping[str, Sequence[int]]) -> tuple[Sizes, ...]:
    """All combinations of the values of several axes, as `Sweep` takes them."""
    return tuple(dict(zip(values, place)) for place in itertools.product(*values.values()))
