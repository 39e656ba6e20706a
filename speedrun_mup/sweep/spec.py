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
from speedrun_mup.training.flops import run_flops

SCHEMA = 1  # of result.json; part of every id
MOST_OCTAVES = 32.0  # either way that a grid may go
MOST_SEEDS = 100


@dataclass(frozen=True)
class Arm:
    """One way to scale with width, as settings. predicted: octaves per doubling that a control's optimum must drift.

    The prediction is for a knob that turns just what is scaled wrongly. lr_scale turns groups that are right as well,
    and the common optimum then lies between, so the sign is what counts.
    """

    name: str
    settings: Mapping[str, Any]
    predicted: float | None = None


# Adam's rate for hidden matrices at base width, where all tables agree: the best of a sweep of matrix_lr alone, laptop
# preset at width 64, one seed. (Record 26 gives its Adam groups multiples of 0.008.)
ADAM = {"matrix_optimizer": "adam", "matrix_lr": 0.008}
MUON = {"matrix_optimizer": "muon"}
# adam-sp is the table "sp", not "adam-constant": what people do without muP. A constant rate is then too fast by m in
# hidden matrices and readout; both call for -1 octave per doubling, which shows even where one knob turns all rates.
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
    """ConfigError if a setting that somebody gave is one that an arm fixes otherwise: no arm overrides a user in silence."""

    def clashes(arm: Arm, names: Iterable[str]) -> list[str]:
        return [name for name in names if arm.settings.get(name, given[name]) != given[name]]

    fixed = [name for name in given if any(name in arm.settings for arm in ARMS.values())]
    for arm in arms:
        for name in clashes(arm, fixed):
            flag = "--" + name.replace("_", "-")
            fit = [other.name for other in ARMS.values() if not clashes(other, fixed)]
            together = " ".join(f"{one}={given[one]}" for one in fixed)
            choice = f"choose among --arms {' '.join(fit)}" if fit else f"no arm has {together}"
            knob = f", or turn it with --knob {name}" if name in swept_settings() else ""
            why = f"{flag} {given[name]}: arm {arm.name} fixes {name} at {arm.settings[name]}"
            raise ConfigError(f"{why}; leave {flag} out{knob}, or {choice}")


@dataclass(frozen=True)
class Cell:
    """One run: its place in the table and its settings. corpus, vocab: fingerprint and vocabulary of its data."""

    arm: str
    width: int
    octaves: float
    seed: int
    cfg: TrainConfig
    corpus: str
    vocab: int

    def __str__(self) -> str:
        return f"{self.arm} width {self.width} 2^{self.octaves:g} seed {self.seed}"

    @functools.cached_property
    def id(self) -> str:
        """16 hex digits, the same wherever the cell runs: a hash of its arm, what it computes, and the data."""
        what = [SCHEMA, self.arm, self.corpus, hashed_settings(self.cfg)]
        text = json.dumps(what, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def flops(self) -> float:
        """What training it takes."""
        return run_flops(self.cfg, self.vocab)


@dataclass(frozen=True)
class Sweep:
    """Which cells to run.

    base: what all cells have in common, with a base_width. octaves: the grid, as powers of two on `knob`, one of
    `swept_settings`. adaptive: extend the grid where the minimum turns out to be at its edge, and, with refine, add the
    half octaves around the minimum, else one point on its better side. Raises ConfigError.
    """

    base: TrainConfig
    widths: tuple[int, ...]
    arms: tuple[Arm, ...] = (ARMS["mup"],)
    octaves: tuple[float, ...] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    knob: str = "lr_scale"
    adaptive: bool = True
    refine: bool = True

    def __post_init__(self) -> None:
        for name in ("widths", "arms", "octaves", "seeds"):
            values = [getattr(value, "name", value) for value in getattr(self, name)]
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name}={','.join(map(str, values))}: name at least one, and none twice")
        if len(self.seeds) > MOST_SEEDS:
            raise ConfigError(f"{len(self.seeds)} seeds: give at most {MOST_SEEDS}")
        if self.knob not in swept_settings():
            raise ConfigError(f"knob={self.knob!r} cannot be turned; choose {', '.join(swept_settings())}")
        if not getattr(self.base, self.knob):
            flag = "--" + self.knob.replace("_", "-")
            raise ConfigError(f"{self.knob}=0 stays 0 under any factor; give {flag} what the factor 1 stands for")
        if far := [at for at in self.octaves if not abs(at) <= MOST_OCTAVES]:
            raise ConfigError(f"octaves={far[0]:g} must be from -{MOST_OCTAVES:g} to {MOST_OCTAVES:g}: a power of two")
        if self.base.base_width is None:
            raise ConfigError("a sweep needs the width that its settings were tuned at; give --base-width")

    def cell(self, arm: Arm, width: int, octaves: float, seed: int, corpus: Corpus) -> Cell:
        """One cell. The data are named so that a worker with another working directory finds them too."""
        data = self.base.data if self.base.data in ("embedded", "synthetic") else corpus.data
        settings: dict[str, Any] = {"data": data, "width": width, "seed": seed, **arm.settings}
        quiet: dict[str, Any] = {"save": False, "val_every": 0, "track": "none", "progress": False}
        cfg = replace(self.base, out="", name=None, resume=None, **quiet, **settings)
        knob: dict[str, Any] = {self.knob: getattr(cfg, self.knob) * 2.0**octaves}
        cfg = replace(cfg, **knob)
        return Cell(arm.name, width, float(octaves), seed, cfg, corpus.fingerprint, corpus.vocab_size)

    def cells(self, points: Mapping[tuple[str, int], Iterable[float]], corpus: Corpus) -> list[Cell]:
        """The cells of all seeds at `points`: (arm, width) -> octaves."""
        return [
            self.cell(arm, width, octaves, seed, corpus)
            for arm in self.arms
            for width in self.widths
            for octaves in sorted(points[arm.name, width])
            for seed in self.seeds
        ]
