"""What a sweep is asked to run: arms, sizes, the grid, and the settings of each run."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from speedrun_mup.config import TrainConfig, hashed_settings, settings, swept_settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.optimizers import OPTIMIZERS
from speedrun_mup.data.shards import Corpus
from speedrun_mup.explain import explain
from speedrun_mup.param_groups import rates_of, without_effect
from speedrun_mup.sweep.arms import ARMS, Arm, is_variant
from speedrun_mup.training.flops import run_flops
from speedrun_mup.transfer import SIZES, Axes
from speedrun_mup.transfer.axes import Sizes, confounded, size_axis, sized, told_sizes

Place = tuple[int, ...]  # values on the size axes of a sweep, in their order
VOCABULARY = 256  # of models whose rates are compared: they do not depend on it
SCHEMA = 1  # of result.json; part of every id
MOST_DOUBLINGS = 32.0  # either way that a grid may go
MOST_SEEDS = 100


ALL_RATES = {f"{optimizer}_lr": optimizer for optimizer in OPTIMIZERS}  # one factor on the rates of all its groups


def can_be_swept(hyperparameter: str) -> bool:
    """Whether a sweep can vary it: settings a factor makes sense on, all rates of an optimizer, or several of these."""
    return all(part in swept_settings() or part in ALL_RATES for part in hyperparameter.split("+"))


def tuned_settings(cfg: TrainConfig, hyperparameter: str) -> tuple[str, ...]:
    """The settings of `cfg` that a factor on the hyperparameter multiplies: of adam_lr those of all groups with Adam."""
    found: dict[str, None] = {}
    for part in hyperparameter.split("+"):
        optimizer = ALL_RATES.get(part)
        found |= dict.fromkeys((part,) if optimizer is None or part in swept_settings() else rates_of(cfg, optimizer))
    return tuple(found)


def times(cfg: TrainConfig, hyperparameter: str, factor: float) -> TrainConfig:
    """`cfg` with the hyperparameter times `factor`."""
    tuned: dict[str, Any] = {name: getattr(cfg, name) * factor for name in tuned_settings(cfg, hyperparameter)}
    return replace(cfg, **tuned)


@dataclass(frozen=True)
class RunSpec:
    """One run: its place in the table and its settings.

    Args:
        sizes: Name of a size axis of the sweep -> value.
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
        sizes: Values of the size axis that `axes` names; or, for several axes at once, one mapping of name to value for each
            size of run, all with the same names in the same order: ({"width": 64, "n_layer": 6}, {"width": 64, "n_layer": 12},
            {"width": 128, "n_layer": 6}). Any set of sizes will do that tells its axes apart, not only full grids (`grid_of`).
        log2_factors: The grid: powers of two on the hyperparameter (`can_be_swept`).
        axes: The hyperparameter; and the size, where there is one axis.
        adaptive: Extend the grid where the minimum turns out to be at its edge.
        refine: Where it is not, add the points halfway between those around the minimum, else one point on its better side.
        held_tokens: Tokens of every run where batch_tokens is an axis: the steps follow. None: the steps stay as in `base`.

    Raises:
        ConfigError: For a value that no run can have.
    """

    base: TrainConfig
    sizes: tuple[int | Sizes, ...]
    arms: tuple[Arm, ...] = (ARMS["mup"],)
    log2_factors: tuple[float, ...] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    axes: Axes = Axes("width", "lr_scale")
    adaptive: bool = True
    refine: bool = True
    held_tokens: int | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        named = {self._plural: self.places, "arms": [arm.name for arm in self.arms]}
        for name, values in {**named, "--octaves": self.log2_factors, "seeds": self.seeds}.items():
            if not values or len(set(values)) < len(values):
                shown = ",".join(str(value[0] if isinstance(value, tuple) else value) for value in values)
                raise ConfigError(f"{name}={shown}: name at least one, and none twice")
        if len(self.seeds) > MOST_SEEDS:
            raise ConfigError(f"{len(self.seeds)} seeds: give at most {MOST_SEEDS}")
        self._check_hyperparameter()
        if self.base.base_width is None:
            raise ConfigError("a sweep needs the width that its settings were tuned at; give --base-width")

    def _check_sizes(self) -> None:
        names = [tuple(size) for size in self.sizes if isinstance(size, Mapping)]
        if names and (len(names) < len(self.sizes) or len(set(names)) > 1 or not names[0]):
            raise ConfigError("sizes: give every run the same axes in the same order, such as width=64, n_layer=6")
        for name in self.size_names:
            if unread := set(size_axis(name).changes) - settings().keys():
                have = ", ".join(axis.name for axis in SIZES.values() if set(axis.changes) <= settings().keys())
                raise ConfigError(f"size axis {name}: no setting of a run is called {min(unread)}; choose {have}")
        if len({"tokens", "iterations"} & {*self.size_names}) > 1:
            raise ConfigError("tokens and iterations are one axis at a given batch; name one of them")
        if self.held_tokens is not None and "batch_tokens" not in self.size_names:
            raise ConfigError(
                "tokens can be held over batch_tokens only; other axes hold the batch and what else there is"
            )
        if self.held_tokens is not None and {"tokens", "iterations"} & {*self.size_names}:
            raise ConfigError("tokens are an axis and cannot be held; leave --hold out")
        if problem := confounded(self.sized):
            raise ConfigError(f"sizes: {problem}")

    def _check_hyperparameter(self) -> None:
        tuned = self.axes.hyperparameter
        if not can_be_swept(tuned):
            names = ", ".join((*swept_settings(), *ALL_RATES))
            raise ConfigError(f"hyperparameter={tuned!r} cannot be swept; choose {names}, or several with + between")
        for arm in self.arms:
            cfg = replace(self.base, **arm.settings)
            own = tuned_settings(cfg, tuned)
            reasons = [without_effect(cfg, name) for name in own]
            if any(reasons) or not own:
                reasons = reasons or ["none of its groups of parameters has that optimizer"]
                raise ConfigError(f"hyperparameter={tuned!r} cannot be swept in arm {arm.name}: {max(reasons)}")
            for name in own:
                if not getattr(cfg, name):
                    flag = "--" + name.replace("_", "-")
                    raise ConfigError(f"{name}=0 stays 0 under any factor; give {flag} what the factor 1 stands for")
        if far := [at for at in self.log2_factors if not abs(at) <= MOST_DOUBLINGS]:
            limits = f"from -{MOST_DOUBLINGS:g} to {MOST_DOUBLINGS:g}"
            raise ConfigError(f"--octaves={far[0]:g} must be {limits}: the log2 of a factor on {tuned}")

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

    @property
    def _plural(self) -> str:
        return self.axes.plural if len(self.size_names) == 1 else "sizes"

    @functools.cached_property
    def predicted(self) -> dict[str, dict[str, float]]:
        """Variant of another arm -> size axis -> the drift that it must show if the rates of that other arm are right.

        It is that of a factor on just the rates that differ, in log2 per doubling; axes without a difference are left out.
        """
        names, found = [arm.name for arm in self.arms], {}
        for arm in self.arms:
            if is_variant(arm.name, names):
                (whole,) = (other for other in self.arms if other.name == arm.name.partition("+")[0])
                drifts = {axis: self._drift_between(arm, whole, axis) for axis in self.size_names}
                found[arm.name] = {axis: drift for axis, drift in drifts.items() if drift}
        return found

    def _drift_between(self, arm: Arm, whole: Arm, axis: str) -> float:
        ends = [pick(sizes[axis] for sizes in self.sized) for pick in (min, max)]
        doublings = math.log2(ends[1] / ends[0])
        if not doublings:
            return 0.0
        small, large = (self._rates_over(arm, whole, dict(self.sized[0]) | {axis: end}) for end in ends)
        error = large - small
        return 0.0 if abs(error) < 1e-6 else round(-error / doublings, 6)

    def _rates_over(self, arm: Arm, whole: Arm, sizes: Sizes) -> float:
        """Log2 of the learning rates of `arm` over those of `whole`, of the tuned parameters that differ most."""
        tuned = self.axes.hyperparameter
        one, other = (self.config_at(each, sizes) for each in (arm, whole))
        factor = 2.0  # on what is tuned, to see which parameters that is
        rows = zip(explain(one, VOCABULARY), explain(times(one, tuned, factor), VOCABULARY), explain(other, VOCABULARY))
        apart = [
            math.log2(mine.here.lr / theirs.here.lr) for mine, turned, theirs in rows if turned.here.lr != mine.here.lr
        ]
        return max(apart, key=abs, default=0.0)

    def told(self) -> Iterator[str]:
        """What varies and what stays, for the beginning of a sweep, a line each."""
        for name in self.size_names:
            values = dict.fromkeys(sizes[name] for sizes in self.sized)
            base = getattr(self.base, size_axis(name).base_setting, None)
            rules = "no rules" if base is None else f"rules from {size_axis(name).base_setting} {base}"
            yield f"axis: {name} {', '.join(map(str, values))}; {rules} for it"
        first = self.config_at(self.arms[0], self.sized[0])
        varied = {*itertools.chain(*(size_axis(name).changes for name in self.size_names))}
        varied |= {"iterations"} if self.held_tokens else set()
        stay = [f"{name} {getattr(first, name)}" for name in ("width", "n_layer", "iterations") if name not in varied]
        if "micro_batches" not in varied:
            stay.append(f"batch_tokens {size_axis('batch_tokens').of(first)}")
        elif self.held_tokens:
            stay.append(f"tokens {self.held_tokens}")
        for name, drifts in self.predicted.items():
            must = ", ".join(f"{drift:+g} per doubling of {axis}" for axis, drift in drifts.items())
            yield f"control: {name}, predicted drift {must}" if must else f"compared: {name}, no drift predicted"
        shown = ", ".join(tuned_settings(first, self.axes.hyperparameter))
        yield f"held: {', '.join(stay)}, and all other settings; tuned: {shown}"

    def config_at(self, arm: Arm, sizes: Sizes) -> TrainConfig:
        """The settings of a run of `arm` at these sizes. Raises ConfigError for sizes that no run can have."""
        return replace(sized(self.base, sizes, self.held_tokens), **arm.settings)

    def run_spec(self, arm: Arm, sizes: int | Sizes, log2_factor: float, seed: int, corpus: Corpus) -> RunSpec:
        """One run. The data are named so that a worker with another working directory finds them too."""
        at = dict(sizes) if isinstance(sizes, Mapping) else {self.axes.size: sizes}
        data = self.base.data if self.base.data in ("embedded", "synthetic") else corpus.data
        quiet: dict[str, Any] = {"save": False, "val_every": 0, "track": "none", "progress": False}
        cfg = replace(self.config_at(arm, at), out="", name=None, resume=None, data=data, seed=seed, **quiet)
        cfg = times(cfg, self.axes.hyperparameter, 2.0**log2_factor)
        return RunSpec(arm.name, at, float(log2_factor), seed, cfg, corpus.fingerprint, corpus.vocab_size)

    def run_specs(self, points: Mapping[tuple[str, Place], Iterable[float]], corpus: Corpus) -> list[RunSpec]:
        """The runs of all seeds at `points`: (arm, place) -> log2 factors."""
        return [
            self.run_spec(arm, sizes, log2_factor, seed, corpus)
            for arm in self.arms
            for sizes in self.sized
            for log2_factor in sorted(points[arm.name, tuple(sizes.values())])
            for seed in self.seeds
        ]


def grid_of(values: Mapping[str, Sequence[int]]) -> tuple[Sizes, ...]:
    """All combinations of the values of several axes, as `Sweep` takes them."""
    return tuple(dict(zip(values, place)) for place in itertools.product(*values.values()))
