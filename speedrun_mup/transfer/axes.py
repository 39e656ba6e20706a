"""The axes of a measurement: the sizes that are scaled, and the hyperparameter whose optimum is looked for.

Everything that a reader sees takes its words from here, and so do sweeps what a size changes of a run: a new axis is one
entry of `SIZES`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.transfer.points import TransferError

ROUNDED = 0.01  # numbers as close as this are one setting, and a power law may be off by it
Sizes = Mapping[str, int]  # name of a size axis -> value


@dataclass(frozen=True)
class SizeAxis:
    """A size that models or runs are scaled in: the words for it, and how a run gets it.

    Args:
        name: Its setting, and its column in a table.
        larger: What the one of two models that has more of it is; largest, smaller and smallest go with it.
        plural: Several values of it; else "values of NAME".
        meaning: A sentence or two for a reader who does not know it.
        also: What other programs call it.
        most: The largest value that is believed.
        base: The setting that says where the rules for this size begin, if there are any: there all its factors are 1; by
            default base_NAME.
        settings: What it changes of a run; by default the setting of its name.
        change: (config, value) -> the values of `settings` for a run of that size. Raises ConfigError for one that no run has.
        read: Config -> its size.
        follow: Sizes that follow from this one where all else stays, as a power of it.
        noun: What has that size: a model, of which a larger one should be better at every step, or a run, or a batch.
    """

    name: str
    larger: str = "larger"
    largest: str = "largest"
    smaller: str = "smaller"
    smallest: str = "smallest"
    plural: str = ""
    meaning: str = "What the models or runs here are scaled in."
    also: tuple[str, ...] = ()
    most: int = 2**31
    base: str = ""
    settings: tuple[str, ...] = ()
    change: Callable[[Any, int], dict[str, Any]] | None = None
    read: Callable[[Any], int] | None = None
    follow: Mapping[str, int] = field(default_factory=dict)
    noun: str = "model"

    @property
    def of_model(self) -> bool:
        """Whether it is the model that is scaled."""
        return self.noun == "model"

    @property
    def base_setting(self) -> str:
        """The setting that says where the rules for this size begin; a run may have none of that name."""
        return self.base or f"base_{self.name}"

    @property
    def changes(self) -> tuple[str, ...]:
        """The settings of a run that it changes."""
        return self.settings or (self.name,)

    def given_to(self, cfg: Any, value: int) -> dict[str, Any]:
        """The settings that `cfg` has at this size. Raises ConfigError for one that it cannot have."""
        return self.change(cfg, value) if self.change else {self.name: value}

    def leads(self, other: str, pairs: Iterable[tuple[float, float]]) -> bool:
        """Whether another size only follows from this one in runs with these pairs of both sizes: tokens from the batch."""
        power = next((power for name, power in self.follow.items() if other in (name, *size_axis(name).also)), None)
        if power is None:
            return False
        rest = [value / size**power for size, value in pairs]
        return max(rest) - min(rest) <= ROUNDED * max(rest)

    def of(self, cfg: Any) -> int:
        """The size of a run with the settings `cfg`."""
        return self.read(cfg) if self.read else getattr(cfg, self.name)


def _micro_batches(cfg: Any, tokens: int) -> dict[str, Any]:
    """So many tokens a step, by the number of micro-batches, whose size stays: sequences are as long as before."""
    micro = cfg.micro_batch_tokens
    if tokens % micro:
        near = max(1, round(tokens / micro)) * micro
        raise ConfigError(f"batch_tokens={tokens} is no multiple of micro_batch_tokens={micro}; try {near}")
    return {"micro_batches": tokens // micro}


def _steps(cfg: Any, tokens: int) -> dict[str, Any]:
    """So many tokens a run, by the number of steps, whose batch stays; phases of the schedule are fractions of the run."""
    schedule = cfg.schedule
    steps = max(1, round(tokens * schedule.iterations / schedule.tokens))
    if (found := _tokens_in(cfg, steps)) != tokens:
        raise ConfigError(f"tokens={tokens} is no whole number of steps of {cfg.batch_tokens} tokens; try {found}")
    return {"iterations": steps}


def _tokens_in(cfg: Any, steps: int) -> int:
    return dataclasses.replace(cfg, iterations=steps).schedule.tokens


WIDTH_ELSEWHERE = (
    "n_embd",
    "d_model",
    "hidden_size",
    "hidden_dim",
    "embed_dim",
    "embedding_dim",
    "model_dim",
    "n_embed",
    "dim",
)
SIZES: dict[str, SizeAxis] = {
    axis.name: axis
    for axis in (
        SizeAxis(
            *("width", "wider", "widest", "narrower", "narrowest", "widths"),
            meaning="Size of the vectors that run through the model (d_model). Narrow models are cheap, wide ones are good.",
            also=WIDTH_ELSEWHERE,
        ),
        SizeAxis(
            *("n_layer", "deeper", "deepest", "shallower", "shallowest"),
            meaning="Number of layers, the depth of the model. Shallow models are cheap, deep ones are good.",
            also=("depth", "n_layers", "num_layers", "layers", "num_hidden_layers"),
            base="base_layers",
        ),
        SizeAxis(
            "batch_tokens",
            meaning="Tokens of one optimizer step.",
            also=("batch", "batch_size", "global_batch_size"),
            most=2**53,
            settings=("micro_batches",),
            change=_micro_batches,
            follow={"tokens": 1, "iterations": -1},
            noun="batch",
        ),
        SizeAxis(
            *("tokens", "longer", "longest", "shorter", "shortest"),
            meaning="Tokens of a whole run, its horizon. The batch stays, the number of steps follows.",
            also=("train_tokens", "num_tokens"),
            most=2**53,
            settings=("iterations",),
            change=_steps,
            read=lambda cfg: cfg.schedule.tokens,
            follow={"iterations": 1},
            noun="run",
        ),
        SizeAxis(
            *("iterations", "longer", "longest", "shorter", "shortest"),
            meaning="Optimizer steps of a whole run, its horizon. The batch stays, the number of tokens follows.",
            also=("steps", "num_steps", "max_steps", "train_steps"),
            most=2**53,
            base="base_tokens",
            follow={"tokens": 1},
            noun="run",
        ),
    )
}


def sized(cfg: Any, sizes: Sizes, held_tokens: int | None = None) -> Any:
    """The settings `cfg` at other sizes, one after another in the order of `SIZES`; all else stays.

    Args:
        cfg: A TrainConfig.
        sizes: Name of an axis -> value.
        held_tokens: Tokens of the run, if its steps should follow from its batch.

    Raises:
        ConfigError: For a size that no run has, and for two that are one setting.
    """
    wanted = dict(sizes) | ({} if held_tokens is None else {"tokens": held_tokens})
    places = list(SIZES)
    for name in sorted(wanted, key=lambda name: places.index(name) if name in places else -1):
        cfg = dataclasses.replace(cfg, **size_axis(name).given_to(cfg, wanted[name]))
    for name, value in wanted.items():
        if (found := size_axis(name).of(cfg)) != value:
            raise ConfigError(f"{name}={value} would be {found} next to {', '.join(n for n in wanted if n != name)}")
    return cfg


def size_axis(name: str) -> SizeAxis:
    """The axis called `name`, in plain words if it is not one of SIZES."""
    return SIZES.get(name) or SizeAxis(name)


def told_sizes(sizes: Sizes) -> str:
    """One place on all axes, for a reader: "width 64, n_layer 6"."""
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def confounded(sizes: Iterable[Sizes]) -> str:
    """A sentence if sizes vary together, so that nothing can tell their effects apart, with what to add; else nothing."""
    import numpy as np

    some = [dict(each) for each in sizes]
    names = [name for name in some[0] if len({each[name] for each in some}) > 1] if some else []
    if len(names) < 2:
        return ""
    design = np.log2([[each[name] for name in names] for each in some])
    if np.linalg.matrix_rank(design - design.mean(axis=0), tol=1e-6) == len(names):
        return ""
    ends = [(min(each[name] for each in some), max(each[name] for each in some)) for name in names]
    for (one, (low, _)), (other, (_, high)) in itertools.permutations(zip(names, ends), 2):
        if not any(each[one] == low and each[other] == high for each in some):
            return (
                f"{' and '.join(names)} vary together in these sizes; add one such as {one} {low} with {other} {high}"
            )
    return f"{' and '.join(names)} vary together in these sizes; add one that changes a single size"


def with_article(name: str) -> str:
    """The name of an axis after "a" or "an"."""
    return f"{'an' if name[:1] in set('aeiou') else 'a'} {name}"


RATE = "lr"  # a table's column of learning rates, whichever they are
ROLES = ("seed", "loss", "arm")  # of a table's other columns


@dataclass(frozen=True)
class Axes:
    """What was scaled and what was tuned, by name, with the words for both.

    Args:
        size: One of `SIZES`, or any other name, which gets plain words.
        hyperparameter: "lr", "lr_scale" or NAME_lr for a learning rate or a factor on some; any other name for itself.

    Raises:
        TransferError: for no name, one that means something else, or the same for both.
    """

    size: str = "width"
    hyperparameter: str = RATE

    def __post_init__(self) -> None:
        for axis, name, such in (("size", self.size, "n_layer"), ("hyperparameter", self.hyperparameter, RATE)):
            if not name.strip():
                raise TransferError(f"the {axis} has no name; name an axis, such as {such}")
            if name in ROLES:
                raise TransferError(
                    f"{axis} {name} is a column with another meaning; name that of an axis, such as {such}"
                )
        if self.size == self.hyperparameter:
            raise TransferError(f"size and hyperparameter are both {self.size}; name a column for each")

    @property
    def scale(self) -> SizeAxis:
        """The size axis with its words."""
        return size_axis(self.size)

    @property
    def plural(self) -> str:
        """Several sizes, for a reader: "widths", "values of n_layer"."""
        return self.scale.plural or f"values of {self.size}"

    @property
    def is_rate(self) -> bool:
        """Whether the hyperparameter is a learning rate, or a factor on some."""
        return self.hyperparameter in (RATE, "lr_scale") or self.hyperparameter.endswith("_lr")

    @property
    def label(self) -> str:
        """The hyperparameter for a reader: "learning rate" for all that are one, else its own name."""
        return "learning rate" if self.is_rate else self.hyperparameter

    @property
    def values(self) -> str:
        """Several values of the hyperparameter, for a reader."""
        return "learning rates" if self.is_rate else f"values of {self.hyperparameter}"

    @property
    def plain_values(self) -> str:
        """The same in the middle of a sentence about them."""
        return "rates" if self.is_rate else "values"

    @property
    def short(self) -> str:
        """The hyperparameter in a list of settings or the header of a table."""
        return RATE if self.is_rate else self.hyperparameter

    def at(self, size: int) -> str:
        """One place on the size axis: "width 64"."""
        return f"{self.size} {size}"
