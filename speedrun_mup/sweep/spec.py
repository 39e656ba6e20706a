"""What a sweep is asked to run: arms, sizes, the grid, and the settings of each run."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from speedrun_mup.config import TrainConfig, computed_settings, settings, swept_settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.optimizers import OPTIMIZERS
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.data.shards import Corpus
from speedrun_mup.explain import explain
from speedrun_mup.param_groups import rates_of, without_effect
from speedrun_mup.sweep.any_sweep import AnySweep
from speedrun_mup.sweep.arms import ARMS, Arm, is_variant
from speedrun_mup.sweep.one_run import RunSpec
from speedrun_mup.training.model_config import model_config
from speedrun_mup.training.tracking import source_sha256
from speedrun_mup.transfer import SIZES
from speedrun_mup.transfer.axes import Sizes, size_axis, sized

VOCABULARY = 256  # of models whose rates are compared: they do not depend on it
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


def varied_settings(names: Iterable[str], held_tokens: int | None) -> set[str]:
    """The settings that differ between the runs of a sweep over these size axes."""
    varied = {*itertools.chain(*(size_axis(name).changes for name in names)), "seed", "parametrization"}
    return varied | ({"iterations"} if held_tokens else set())


@dataclass(frozen=True)
class Sweep(AnySweep):
    """Which runs of this package's model to make.

    Args:
        base: The settings of all runs, with a base_width.
        sizes: See `AnySweep`; `sized` says how a run gets them.
        arms: Parametrizations.
        log2_factors: See `AnySweep`, as seeds, adaptive and refine.
        axes: The size, where there is one axis, and the hyperparameter (`can_be_swept`).
        held_tokens: Tokens of every run where batch_tokens is an axis: the steps follow. None: the steps stay as in `base`.

    Raises:
        ConfigError: For a value that no run can have.
    """

    base: TrainConfig
    arms: tuple[Arm, ...] = (ARMS["mup"],)
    held_tokens: int | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        super().__post_init__()
        self._check_hyperparameter()
        if self.base.base_width is None:
            raise ConfigError("a sweep needs the width that its settings were tuned at; give --base-width")

    def _check_sizes(self) -> None:
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
        """See `AnySweep`."""
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

    def check(self) -> Corpus:
        """The corpus. Raises ConfigError for a shape that no model has."""
        corpus, _ = find_corpus(self.base.data, self.base.tokenizer)
        for arm, sizes in itertools.product(self.arms, self.sized):
            model_config(self.config_at(arm, sizes), corpus)
        return corpus

    def definition(self, data: Corpus, known: Mapping[str, Any]) -> dict[str, Any]:
        """See `AnySweep`. data: the corpus, which a folder may know by the fingerprint of an earlier edition."""
        settings = {name: value for name, value in computed_settings(self.base).items() if name not in self.varied}
        held = {"held_tokens": self.held_tokens} if self.held_tokens else {}
        former = known.get("corpus", "")
        return {**held, "corpus": former if data.is_known_as(former) else data.fingerprint, **settings}

    def as_recorded(self, data: Corpus, recorded: Mapping[str, Any]) -> Corpus:
        """See `AnySweep`."""
        return replace(data, fingerprint=recorded["corpus"])

    @property
    def varied(self) -> set[str]:
        """The settings that differ from run to run, which are in no base of a sweep.json."""
        return varied_settings(self.size_names, self.held_tokens)

    def seeds_draw(self) -> str:
        """See `AnySweep`."""
        if self.base.data_order == "record":
            return "initialisation; the data keep the record's order, the same for all seeds, in the first epoch"
        return "initialisation and the order of the data"

    def source(self) -> str:
        """See `AnySweep`."""
        return source_sha256()

    def run_spec(self, arm: Arm, sizes: int | Sizes, log2_factor: float, seed: int, corpus: Corpus) -> RunSpec:
        """One run. The data are named so that a worker with another working directory finds them too."""
        at = dict(sizes) if isinstance(sizes, Mapping) else {self.axes.size: sizes}
        data = self.base.data if self.base.data in ("embedded", "synthetic") else corpus.data
        quiet: dict[str, Any] = {"save": False, "val_every": 0, "track": "none", "progress": False}
        cfg = replace(self.config_at(arm, at), out="", name=None, resume=None, data=data, seed=seed, **quiet)
        cfg = times(cfg, self.axes.hyperparameter, 2.0**log2_factor)
        return RunSpec(arm.name, at, float(log2_factor), seed, cfg, corpus.fingerprint, corpus.vocab_size)
