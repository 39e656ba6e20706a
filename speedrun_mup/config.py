"""Every setting of a training run, declared once: its flag, its checks, and what it means for a resume come from one field.

Imports no torch, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup import PARAMETRIZATIONS
from speedrun_mup.core.optimizers import ORTHOGONALIZERS
from speedrun_mup.editions import FIRST_HASHED, first_names, missing_settings, present_names
from speedrun_mup.flags import LARGEST
from speedrun_mup.param_groups import (
    Hyperparams,
    ParamGroup,
    hyperparams_of,
    with_param_groups,
    with_rates,
    without_effect,
)
from speedrun_mup.presets import PRESETS
from speedrun_mup.scaling import switched_on, with_scaling_settings
from speedrun_mup.settings import (
    BELOW_ONE,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Setting,
    at_least,
    at_most,
    fault_of_new,
    problems,
    setting,
    settings_of,
    value_types,
)
from speedrun_mup.techniques import TECHNIQUES, Technique, with_technique_settings, with_techniques

if TYPE_CHECKING:
    from speedrun_mup.training.schedules import Schedule

FEW, COUNT = (at_most(2**20), at_least(0)), (at_most(2**20), at_least(1))
TOKENS = (at_most(2**31), at_least(1))
STEPS, ITERATIONS = (at_most(LARGEST), at_least(0)), (at_most(LARGEST), at_least(1))


@dataclass(frozen=True)
@with_technique_settings
@with_param_groups
@with_scaling_settings
class TrainConfig:
    """One training run. The defaults are the record-26 preset: record 26 as published, at its own size."""

    width: int = setting("scaling", "residual width; a multiple of --head-dim", 768, affects="result", valid=COUNT)
    base_width: int | None = setting(
        "scaling",
        "width that the learning rates were tuned at; switches muP on (default: the preset's with muP, else --width)",
        None,
        affects="result",
        valid=COUNT,
    )
    parametrization: str = setting(
        "scaling",
        "rule table for scaling with width; --mup is short for mup",
        "record26",
        affects="result",
        choices=PARAMETRIZATIONS,
        shorthand={"--mup": "mup"},
    )

    n_layer: int = setting(
        "model",
        "layers, at least 2",
        12,
        affects="result",
        valid=(at_most(4096), at_least(1)),  # nothing is allocated yet, but every layer is built
    )
    head_dim: int = setting("model", "size of an attention head", 128, affects="result", valid=COUNT)
    block_size: int = setting(
        "model", "granularity of the attention window, in tokens", 128, affects="result", valid=TOKENS
    )
    window_tokens: int = setting(
        "model",
        "long attention window at the end of training; it grows from one block",
        1728,
        affects="result",
        valid=TOKENS,
    )

    micro_batch_tokens: int = setting(
        "batch",
        "tokens of one micro-batch; a multiple of --block-size",
        49152,
        affects="result",
        valid=TOKENS,
        fitted=True,
    )
    micro_batches: int = setting(
        "batch",
        "micro-batches of a step, over all ranks; a multiple of the rank count",
        8,
        affects="result",
        valid=COUNT,
        fitted=True,
    )
    micro_batches_per_forward: int = setting(
        "batch", "micro-batches in one forward pass; 0 = automatic", 0, affects="speed", valid=FEW, fitted=True
    )

    seed: int = setting(
        "run",
        "fixes the initial weights and the order of the data (see --data-order)",
        0,
        affects="result",
        valid=(at_least(0),),
    )
    deterministic: bool = setting(
        "training",
        "bitwise identical on any number of ranks: gradients are summed in a fixed tree, by deterministic kernels",
        False,
        affects="result",
    )
    on_nonfinite: str = setting(
        "training",
        "when the loss or a gradient is not finite: stop, skip the step, or roll back to the last checkpoint and leave "
        "the data out",
        "stop",
        affects="result",
        on_resume="free",
        choices=("stop", "skip", "rollback"),
    )
    fit_memory: bool = setting(
        "run",
        "until a step fits the device's memory, halve --micro-batches-per-forward, then --micro-batch-tokens (with twice "
        "the --micro-batches); until a validation pass fits, halve the tokens that it sees at once",
        False,
        affects="result",
    )

    lr_scale: float = setting(
        "optimizer",
        "multiplier on all learning rates; the default sweep variable",
        1.0,
        affects="result",
        valid=(POSITIVE,),
    )
    orthogonalizer: str | None = setting(
        "momentum",
        "how Muon and NorMuon set singular values to 1 (default: newton-schulz for Muon, polar-express for NorMuon)",
        None,
        affects="result",
        choices=ORTHOGONALIZERS,
    )
    adam_eps: float = setting(
        "optimizer", "for gradients summed over a micro-batch's tokens", 1e-10, affects="result", valid=(POSITIVE,)
    )
    weight_decay: float = setting(
        "optimizer", "decoupled; multiplied by the learning rate", 0.0, affects="result", valid=(NOT_NEGATIVE,)
    )

    adam_beta1: float = setting("momentum", "Adam's first moment decay", 0.8, affects="result", valid=(BELOW_ONE,))
    adam_beta2: float = setting("momentum", "Adam's second moment decay", 0.95, affects="result", valid=(BELOW_ONE,))
    momentum: float = setting("momentum", "Muon's, after warmup", 0.95, affects="result", valid=(BELOW_ONE,))
    momentum_start: float = setting("schedule", "Muon's, at step 0", 0.85, affects="result", valid=(BELOW_ONE,))

    iterations: int = setting(
        "schedule", "optimizer steps", 1750, affects="result", on_resume="lasting", valid=ITERATIONS
    )
    batch_schedule: str = setting(
        "schedule",
        "constant, record46, or stages such as 1/3:1,1/3:2:1.5: fraction of the steps, factors on --micro-batches and rates",
        "constant",
        affects="result",
    )
    momentum_warmup: int = setting(
        "schedule", "steps to warm Muon's momentum up from start to final", 300, affects="result", valid=STEPS
    )
    cooldown: float = setting(
        "schedule",
        "last fraction of training in which the learning rate falls",
        0.45,
        affects="result",
        valid=(FRACTION,),
    )
    final_lr_frac: float = setting(
        "schedule", "final learning rate, as a fraction of the peak", 0.10, affects="result", valid=(FRACTION,)
    )

    data: str = setting(  # what it holds is compared by its fingerprint
        "data",
        "auto, embedded, synthetic, a folder of shards, or several with weights: a:0.7,b:0.3",
        "auto",
        affects="storage",
        on_resume="lasting",
    )
    tokenizer: str = setting(
        "data", "of the embedded corpus: byte, or bpe:N with N tokens", "byte", affects="storage", on_resume="lasting"
    )
    data_order: str = setting(
        "data",
        "record: sequences start at documents, in file order, what lies between is skipped, and --seed counts from the "
        "second epoch on; shuffled: all tokens, in an order drawn by --seed and epoch",
        "record",
        affects="result",
        choices=("record", "shuffled"),
    )
    epochs: int | None = setting(
        "data",
        "maximum epochs; error instead of repeating more (default: repeat)",
        None,
        affects="result",
        valid=ITERATIONS,
    )
    val_tokens: int = setting(
        "data", "tokens of the validation split to use", 10_485_760, affects="result", valid=ITERATIONS
    )
    val_chunk_tokens: int = setting(
        "data",
        "tokens that one validation pass sees at once",
        262_144,
        affects="result",
        valid=TOKENS,
        shown=False,
        fitted=True,
    )
    val_every: int = setting(
        "run", "steps between validations; 0 is only at the end", 125, affects="display", valid=STEPS
    )
    sample_every: int = setting(
        "run", "steps between samples of the model's text; 0 is none", 0, affects="display", valid=STEPS
    )

    out: str = setting("run", "folder that holds run folders", "runs", affects="storage")
    name: str | None = setting("run", "run folder's name (default: RULES-wWIDTH-sSEED-TIME)", None, affects="storage")
    resume: str | None = setting(
        "run", "resume a run: its folder, or auto for the newest unfinished one", None, affects="storage"
    )
    init_from: str | None = setting(
        "run",
        "begin a new run with the weights of another: its folder, or that of one of its checkpoints",
        None,
        affects="result",
        on_resume="free",  # the checkpoint has the weights
    )
    save: bool = setting("run", "write checkpoints; the sweep's many small runs do without", True, affects="storage")
    save_every: int = setting(
        "run", "steps between checkpoints; 0 is only at the end", 0, affects="storage", valid=STEPS
    )
    keep_last: int = setting(
        "run", "checkpoints to keep, at least 2", 2, affects="storage", valid=(at_most(2**20), at_least(2))
    )
    keep_every: int = setting(
        "run",
        "also keep every checkpoint whose step is a multiple of this; 0 is none",
        0,
        affects="storage",
        valid=STEPS,
    )
    track: str = setting(
        "run",
        "mirror metrics to a tracker",
        "none",
        affects="display",
        choices=("none", "tensorboard", "wandb", "trackio"),
    )
    timeout_s: float = setting(
        "run", "seconds that a rank waits for the others before it gives up", 600.0, affects="speed", valid=(POSITIVE,)
    )
    progress: bool = setting("display", "show progress", True, affects="display")

    device: str = setting(
        "device",
        "CUDA_VISIBLE_DEVICES chooses among several GPUs",
        "auto",
        affects="speed",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    dtype: str = setting(
        "device",
        "of activations and embeddings: auto is bfloat16 on CUDA",
        "auto",
        affects="result",
        choices=("auto", "float32", "bfloat16"),
    )
    attention: str = setting(
        "device",
        "backend; auto probes the device",
        "auto",
        affects="speed",
        choices=("auto", "flex", "blocked", "dense"),
    )
    compile: bool | None = setting("device", "torch.compile the model (default: only on CUDA)", None, affects="speed")
    fp8: bool | None = setting(
        "device",
        "FP8 matmuls in lm_head during training (default: where the GPU has them and it is compiled)",
        None,
        affects="result",
    )
    kernel_warmup: int = setting("device", "untimed warmup steps to compile kernels", 10, affects="speed", valid=FEW)

    def __post_init__(self) -> None:
        wrong = problems(self)
        for name in ("micro_batch_tokens", "val_chunk_tokens"):
            value = getattr(self, name)
            if self.block_size > 0 and value % self.block_size:
                near = max(value // self.block_size, 1) * self.block_size
                wrong.append(f"{name}={value} is not a multiple of block_size={self.block_size}; try {near}")
        if self.name is not None and not re.fullmatch(r"(?!\.)[^/\0]{1,200}", self.name):
            wrong.append(
                f"name={self.name[:40]!r} is not a folder name inside out; it must not have a / or a leading dot"
            )
        if wrong:
            raise ConfigError("; ".join(wrong))
        _ = self.schedule  # raises, too

    def __reduce__(self) -> tuple[Any, ...]:
        return build, ({name: getattr(self, name) for name in settings()},)

    @property
    def schedule(self) -> Schedule:
        """What changes from step to step. ConfigError for stages that this run cannot have."""
        from speedrun_mup.training.schedules import Schedule  # `--help` needs none of it

        return with_techniques("schedule", Schedule.of(self), self)

    @property
    def groups(self) -> dict[str, Hyperparams]:
        """The hyperparameters of every group that models declare; what a group has none of is the common value."""
        return hyperparams_of(self)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step, before --batch-schedule multiplies them."""
        return self.micro_batches * self.micro_batch_tokens

    @property
    def tuned_width(self) -> int:
        """The width that the learning rates are meant for: base_width, else the run's own."""
        return self.base_width or self.width


_GROUPS = "scaling model techniques batch training optimizer momentum schedule data run display device"
GROUPS = tuple(_GROUPS.split())
_in_force: Any = TrainConfig  # with what was added from outside the package


def add_setting(name: str, kind: Any, declared: Any) -> None:
    """Add a setting from outside the package: it gets a flag, and a place in config.json, resume checks and hashes.

    Args:
        name: its name; `cfg.NAME` is its value.
        kind: its type, such as float or int | None.
        declared: what `setting` returns.
    """
    _extend([(name, kind, declared)])


def add_param_group(name: str, group: ParamGroup) -> None:
    """Add a group of parameters from outside the package; modules declare `name` as the group of their parameters."""
    _extend(group.fields(name))


def add_technique(name: str, technique: Technique) -> None:
    """Add a technique from outside the package: its settings and groups of parameters, and what it does to a run."""
    _extend(technique.fields(name))
    TECHNIQUES[name] = technique


def _extend(fields: list[tuple[str, Any, Any]]) -> None:
    global _in_force
    for name, _, declared in fields:
        if fault := fault_of_new(name, declared, _in_force, GROUPS):
            raise ConfigError(f"setting {name} cannot be added: {fault}")
    _in_force = dataclasses.make_dataclass("TrainConfig", fields, bases=(_in_force,), frozen=True)


def build(values: Mapping[str, Any]) -> TrainConfig:
    """The config with these settings. Raises ConfigError for values that cannot be, and for unknown settings."""
    check_known(values)
    return _in_force(**values)


def check_known(names: Iterable[str]) -> None:
    """ConfigError if one of these is no setting here."""
    if unknown := sorted({*names} - settings().keys()):
        raise ConfigError(f"setting {unknown[0]} is unknown here; import what adds it first")


def check_whole(saved: Mapping[str, Any]) -> None:
    """ConfigError if a setting is missing that every run had from the start."""
    if missing := missing_settings(saved):
        raise ConfigError(f"setting {missing[0]} is missing")


def settings() -> dict[str, Setting]:
    """All settings by name, in the order of `--help`."""
    return settings_of(_in_force, GROUPS)


def types() -> dict[str, tuple[type, bool]]:
    """The type of every setting, and whether it may be None."""
    return value_types(_in_force)


def defaults() -> dict[str, Any]:
    """The default of every setting."""
    return {name: getattr(_in_force, name) for name in settings()}


def swept_settings() -> list[str]:
    """The hyperparameters that a sweep can turn: those that a factor makes sense on."""
    return [name for name, meta in settings().items() if meta.is_result and {POSITIVE, NOT_NEGATIVE} & {*meta.valid}]


def computed_settings(cfg: TrainConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, without where it runs and what it shows."""
    return {name: getattr(cfg, name) for name, meta in settings().items() if meta.is_result}


def hashed_settings(cfg: TrainConfig) -> dict[str, Any]:
    """`computed_settings` as the hash of a run has them: the same in every edition that computes the same."""
    usual = defaults()
    values = first_names(computed_settings(cfg))
    return {name: value for name, value in values.items() if name in FIRST_HASHED or value != usual[name]}


def known_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier edition saved, with the default for each setting that is newer."""
    return {**defaults(), **present_names(saved)}


def config_of(saved: Mapping[str, Any]) -> TrainConfig:
    """The config of which a checkpoint, maybe of an earlier edition, saved the settings. ConfigError if some are missing."""
    check_whole(saved)
    return build(known_settings(saved))


def make_config(preset: str, overrides: Mapping[str, Any], arms: Sequence[Mapping[str, Any]] = ()) -> TrainConfig:
    """The preset with `overrides` on top.

    muP is on if a rule table or a base width asks for it, under every preset alike: a base width alone means muP, and a
    rule table alone takes the preset's base width. With neither, the rules are the record's own. The same with
    depth, batch and tokens: a base alone means the usual rule, a rule alone takes the preset's size, see scaling.py.
    Another optimizer than the preset's takes its own learning rate, see RATES in param_groups.py.

    Args:
        preset: its name.
        overrides: settings that were asked for.
        arms: settings on top of which runs are made, of a sweep.

    Returns:
        The config, without arms.

    Raises:
        ConfigError: for values that cannot be, and for a hyperparameter, other than the preset's, that nothing reads.
    """
    overrides, usual = present_names(overrides), {**defaults(), **PRESETS[preset].settings}
    values = {**PRESETS[preset].settings, **with_rates(overrides, usual)}
    if values.get("base_width") is not None:
        values.setdefault("parametrization", "mup")
    elif "parametrization" in values:
        values["base_width"] = PRESETS[preset].base_width
    cfg = build(values | switched_on(values, usual))
    made = [dataclasses.replace(cfg, **arm) for arm in arms] or [cfg]
    for name in overrides:
        reasons = [without_effect(each, name) for each in made] if values[name] != usual[name] else [""]
        if all(reasons):
            raise ConfigError(reasons[0])
    return cfg
