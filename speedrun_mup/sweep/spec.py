"""What a sweep is asked to run: arms, the grid, and the settings of each run."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from speedrun_mup.config import TrainConfig, hashed_settings, swept_settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup import PARAMETRIZATIONS
from speedrun_mup.core.optimizers import OPTIMIZERS
from speedrun_mup.data.shards import Corpus
from speedrun_mup.param_groups import without_effect
from speedrun_mup.training.flops import run_flops
from speedrun_mup.transfer import Axes

SCHEMA = 1  # of result.json; part of every id
MOST_DOUBLINGS = 32.0  # either way that a grid may go
MOST_SEEDS = 100


@dataclass(frozen=True)
class Arm:
    """One parametrization, as settings. predicted: the drift that a control must have, log2 per doubling of width.

    The prediction is for a hyperparameter of just what is scaled wrongly. lr_scale is a factor on groups that are right as
    well, and the common optimum then lies between, so the sign is what counts.
    """

    name: str
    settings: Mapping[str, Any]
    predicted: float | None = None


# Adam's rate for hidden matrices at base width, where all tables agree: the best of a sweep of matrix_lr alone, laptop
# preset at width 64, one seed. (Record 26 gives its Adam groups multiples of 0.008.)
ADAM = {"matrix_optimizer": "adam", "matrix_lr": 0.008}
MUON = {"matrix_optimizer": "muon"}
# adam-sp is the table "sp", not "adam-constant": what people do without muP. A constant rate is then too fast by m in
# hidden matrices and readout; both call for half the rate per doubling, which shows even where one factor is on all rates.
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("mup", {"parametrization": "mup", **MUON}),
        Arm("record26", {"parametrization": "record26", **MUON}),
        Arm("adam-mup", {"parametrization": "mup", **ADAM}),
        Arm("adam-sp", {"parametrization": "sp", **ADAM}, predicted=-1.0),
        Arm("muon-sqrt-m", {"parametrization": "muon-sqrt-m", **MUON}, predicted=-0.5),
        Arm("muon-over-m", {"parametrization": "muon-over-m", **MUON}, predicted=1.0),
    )
}


def arm_name(optimizer: str, table: str) -> str:
    """How an arm is called: by its rule table alone where Muon has the hidden matrices."""
    return table if optimizer == "muon" else f"{optimizer}-{table}"


def pick_arms(names: Iterable[str]) -> tuple[Arm, ...]:
    """The arms called `names`: those of ARMS, or any OPTIMIZER-TABLE. Raises ConfigError for an unknown one."""
    return tuple(_pick_arm(name) for name in names)


def _pick_arm(name: str) -> Arm:
    if name in ARMS:
        return ARMS[name]
    for optimizer, table in itertools.product(OPTIMIZERS, PARAMETRIZATIONS):
        if name == arm_name(optimizer, table):
            own = ADAM if optimizer == "adam" else {"matrix_optimizer": optimizer}
            return Arm(name, {"parametrization": table, **own})
    raise ConfigError(
        f"arm {name!r} is unknown; choose from {', '.join(ARMS)}, or OPTIMIZER-TABLE with an optimizer of "
        f"{', '.join(OPTIMIZERS)} and a rule table of {', '.join(PARAMETRIZATIONS)}"
    )


def check_given(arms: Sequence[Arm], given: Mapping[str, Any]) -> None:
    """ConfigError if the user gave a setting that an arm fixes otherwise: no arm overrides a user silently."""

    def clashes(arm: Arm, names: Iterable[str]) -> list[str]:
        return [name for name in names if arm.settings.get(name, given[name]) != given[name]]

    fixed = [name for name in given if any(name in arm.settings for arm in ARMS.values())]
    for arm in arms:
        for name in clashes(arm, fixed):
            flag = "--" + name.replace("_", "-")
            fit = [other.name for other in ARMS.values() if not clashes(other, fixed)]
            together = " ".join(f"{one}={given[one]}" for one in fixed)
            choice = f"choose among --arms {' '.join(fit)}" if fit else f"no arm has {together}"
            tuned = f", or sweep it with --hyperparameter {name}" if name in swept_settings() else ""
            why = f"{flag} {given[name]}: arm {arm.name} fixes {name} at {arm.settings[name]}"
            raise ConfigError(f"{why}; leave {flag} out{tuned}, or {choice}")


@dataclass(frozen=True)
class RunSpec:
    """One run: its place in the table and its settings.

    Args:
        sizes: Name of a size axis -> value; the axis of the sweep comes first.
        log2_factor: On the hyperparameter.
        corpus: Fingerprint of its data; vocab_size: their vocabulary.
    """

    arm: str
    sizes: Mapping[str, int]
    log2_factor: float
    seed: int
    cfg: TrainConfig
    corpus: str
    vocab_size: int

    def __str__(self) -> str:
        sizes = " ".join(f"{name} {size}" for name, size in self.sizes.items())
        return f"{self.arm} {sizes} 2^{self.log2_factor:g} seed {self.seed}"

    @property
    def size(self) -> int:
        """Its place on the size axis of the sweep."""
        return next(iter(self.sizes.values()))

    @functools.cached_property
    def id(self) -> str:
        """16 hex digits, the same wherever it runs: a hash of its arm, what it computes, and the data."""
        what = [SCHEMA, self.arm, self.corpus, hashed_settings(self.cfg)]
        text = json.dumps(what, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def flops(self) -> float:
        """What training it takes."""
        return run_flops(self.cfg, self.vocab_size)


@dataclass(frozen=True)
class Sweep:
    """Which runs to make.

    Args:
        base: What all runs have in common, with a base_width.
        sizes: Values of the size axis, which is a setting.
        log2_factors: The grid: powers of two on the hyperparameter, which is one of `swept_settings`.
        adaptive: Extend the grid where the minimum turns out to be at its edge.
        refine: Where it is not, add the points halfway between those around the minimum, else one point on its better side.

    Raises:
        ConfigError: For a value that no run can have.
    """

    base: TrainConfig
    sizes: tuple[int, ...]
    arms: tuple[Arm, ...] = (ARMS["mup"],)
    log2_factors: tuple[float, ...] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    axes: Axes = Axes("width", "lr_scale")
    adaptive: bool = True
    refine: bool = True

    def __post_init__(self) -> None:
        named = {self.axes.plural: self.sizes, "arms": [arm.name for arm in self.arms]}
        for name, values in {**named, "--octaves": self.log2_factors, "seeds": self.seeds}.items():
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name}={','.join(map(str, values))}: name at least one, and none twice")
        if len(self.seeds) > MOST_SEEDS:
            raise ConfigError(f"{len(self.seeds)} seeds: give at most {MOST_SEEDS}")
        tuned = self.axes.hyperparameter
        if tuned not in swept_settings():
            raise ConfigError(f"hyperparameter={tuned!r} cannot be swept; choose {', '.join(swept_settings())}")
        for arm in self.arms:
            if reason := without_effect(replace(self.base, **arm.settings), tuned):
                raise ConfigError(f"hyperparameter={tuned!r} cannot be swept in arm {arm.name}: {reason}")
        if not getattr(self.base, tuned):
            flag = "--" + tuned.replace("_", "-")
            raise ConfigError(f"{tuned}=0 stays 0 under any factor; give {flag} what the factor 1 stands for")
        if far := [at for at in self.log2_factors if not abs(at) <= MOST_DOUBLINGS]:
            limits = f"from -{MOST_DOUBLINGS:g} to {MOST_DOUBLINGS:g}"
            raise ConfigError(f"--octaves={far[0]:g} must be {limits}: the log2 of a factor on {tuned}")
        if self.base.base_width is None:
            raise ConfigError("a sweep needs the width that its settings were tuned at; give --base-width")

    def run_spec(self, arm: Arm, size: int, log2_factor: float, seed: int, corpus: Corpus) -> RunSpec:
        """One run. The data are named so that a worker with another working directory finds them too."""
        data = self.base.data if self.base.data in ("embedded", "synthetic") else corpus.data
        settings: dict[str, Any] = {"data": data, self.axes.size: size, "seed": seed, **arm.settings}
        quiet: dict[str, Any] = {"save": False, "val_every": 0, "track": "none", "progress": False}
        cfg = replace(self.base, out="", name=None, resume=None, **quiet, **settings)
        tuned: dict[str, Any] = {self.axes.hyperparameter: getattr(cfg, self.axes.hyperparameter) * 2.0**log2_factor}
        cfg, sizes = replace(cfg, **tuned), {self.axes.size: size}
        return RunSpec(arm.name, sizes, float(log2_factor), seed, cfg, corpus.fingerprint, corpus.vocab_size)

    def run_specs(self, points: Mapping[tuple[str, int], Iterable[float]], corpus: Corpus) -> list[RunSpec]:
        """The runs of all seeds at `points`: (arm, size) -> log2 factors."""
        return [
            self.run_spec(arm, size, log2_factor, seed, corpus)
            for arm in self.arms
            for size in self.sizes
            for log2_factor in sorted(points[arm.name, size])
            for seed in self.seeds
        ]
