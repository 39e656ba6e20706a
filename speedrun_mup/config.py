"""Every setting of a training run, declared once: its default, type, flag and help all come from one field.

Imports no torch, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.flags import LARGEST, Parser


def setting(
    group: str, help: str, default: Any, choices: Sequence[str] = (), shorthand: Mapping[str, str] | None = None
):
    """A field of TrainConfig with what its flag needs. shorthand: {flag: value}, such as {"--mup": "mup"}."""
    metadata = {"group": group, "help": help, "choices": tuple(choices), "shorthand": dict(shorthand or {})}
    return field(default=default, metadata=metadata)


TABLES = ("mup", "sp", "record26", "muon-over-m", "muon-sqrt-m", "adam-constant", "head-sqrt")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The defaults are the record-26 preset: record 26 as published, at its own size."""

    width: int = setting("model", "residual width; a multiple of --head-dim", 768)
    base_width: int | None = setting(
        "model",
        "width that the learning rates were tuned at; switches muP on (default: the preset's with muP, else --width)",
        None,
    )
    parametrization: str = setting(
        "model", "rule table for scaling with width; --mup is short for mup", "record26", TABLES, {"--mup": "mup"}
    )
    n_layer: int = setting("model", "layers; even, at least 6", 12)
    head_dim: int = setting("model", "size of an attention head", 128)
    block_size: int = setting("model", "granularity of the attention window, in tokens", 128)
    window_tokens: int = setting("model", "long attention window at the end of training; it grows from one block", 1728)

    iterations: int = setting("training", "optimizer steps", 1750)
    micro_batch_tokens: int = setting("training", "tokens of one micro-batch; a multiple of --block-size", 49152)
    micro_batches: int = setting("training", "micro-batches of a step, over all ranks; a multiple of the rank count", 8)
    pack: int = setting("training", "micro-batches that one forward pass takes side by side; 0 chooses", 0)
    micro_batch: str = setting(
        "training",
        "auto: until a step fits the device's memory, halve --pack, then --micro-batch-tokens (with twice the "
        "--micro-batches); until a validation pass fits, halve --val-chunk-tokens",
        "fixed",
        ("fixed", "auto"),
    )
    seed: int = setting("training", "fixes the initial weights and the order of the data (see --data-order)", 0)

    strict: bool = setting(
        "training",
        "sum gradients in a fixed tree over micro-batches, with deterministic kernels: the same bits on any number of ranks",
        False,
    )
    on_nonfinite: str = setting(
        "training",
        "when the loss or a gradient is not finite: stop, skip the step, or roll back to the last checkpoint and leave "
        "the data out",
        "stop",
        ("stop", "skip", "rollback"),
    )

    matrix_lr: float = setting("optimizer", "hidden matrices", 0.05)
    embed_lr: float = setting("optimizer", "embedding and value embeddings", 0.6)
    head_lr: float = setting("optimizer", "readout", 0.22)
    scalar_lr: float = setting("optimizer", "skip weights and mixing coefficients", 0.04)
    lr_scale: float = setting("optimizer", "one factor on all four learning rates: the knob that a sweep turns", 1.0)
    hidden_optimizer: str = setting("optimizer", "who updates the hidden matrices", "muon", ("muon", "adam"))
    adam_beta1: float = setting("optimizer", "first moment decay", 0.8)
    adam_beta2: float = setting("optimizer", "second moment decay", 0.95)
    adam_eps: float = setting("optimizer", "for gradients summed over a micro-batch's tokens", 1e-10)
    scalar_eps: float = setting("optimizer", "the scalars'; 1e-10 turns their first, noisy gradient into a kick", 1e-10)
    weight_decay: float = setting("optimizer", "decoupled; multiplied by the learning rate", 0.0)
    momentum: float = setting("optimizer", "Muon's, after warmup", 0.95)
    momentum_start: float = setting("optimizer", "Muon's, at step 0", 0.85)
    momentum_warmup: int = setting("optimizer", "steps from the one to the other", 300)
    cooldown: float = setting("optimizer", "last fraction of training in which the learning rate falls", 0.45)
    lr_floor: float = setting("optimizer", "where it falls to, as a fraction", 0.10)

    data: str = setting(
        "data", "auto, embedded, synthetic, a folder of shards, or several with weights: a:0.7,b:0.3", "auto"
    )
    tokenizer: str = setting("data", "of the embedded corpus: byte, or bpe:N with N tokens", "byte")
    data_order: str = setting(
        "data",
        "record: sequences start at documents, in file order, what lies between is skipped, and --seed counts from the "
        "second epoch on; shuffled: all tokens, in an order drawn by --seed and epoch",
        "record",
        ("record", "shuffled"),
    )
    epochs: int | None = setting(
        "data", "stop with an error rather than see the data more often (default: repeat)", None
    )
    val_tokens: int = setting("data", "tokens of the validation split to use", 10_485_760)
    val_chunk_tokens: int = setting("data", "tokens that one validation pass sees at once", 262_144)
    val_every: int = setting("data", "steps between validations; 0 is only at the end", 125)

    out: str = setting("run", "folder that holds run folders", "runs")
    name: str | None = setting("run", "run folder's name (default: made from the settings and the time)", None)
    resume: str | None = setting("run", "go on with a run: its folder, or auto for the newest unfinished one", None)
    init_from: str | None = setting(
        "run", "begin a new run with the weights of another: its folder, or that of one of its checkpoints", None
    )
    save: bool = setting("run", "write checkpoints; the sweep's many small runs do without", True)
    save_every: int = setting("run", "steps between checkpoints; 0 is only at the end", 0)
    keep_last: int = setting("run", "checkpoints to keep, at least 2", 2)
    keep_every: int = setting("run", "also keep every checkpoint whose step is a multiple of this; 0 is none", 0)
    track: str = setting("run", "mirror metrics to a tracker", "none", ("none", "tensorboard", "wandb", "trackio"))
    progress: bool = setting("run", "show progress", True)

    device: str = setting(
        "device", "CUDA_VISIBLE_DEVICES chooses among several GPUs", "auto", ("auto", "cpu", "cuda", "mps")
    )
    dtype: str = setting(
        "device", "of activations and embeddings: auto is bfloat16 on CUDA", "auto", ("auto", "float32", "bfloat16")
    )
    attention: str = setting("device", "backend; auto probes the device", "auto", ("auto", "flex", "blocked", "dense"))
    compile: bool | None = setting("device", "torch.compile the model (default: only on CUDA)", None)
    timeout_s: float = setting("device", "seconds that a rank waits for the others before it gives up", 600.0)
    fp8: bool | None = setting(
        "device", "8-bit products in the head's training (default: where the GPU has them and it is compiled)", None
    )
    kernel_warmup: int = setting("device", "throw-away steps before training, to compile and warm up", 10)

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be {what}"
            for what, ok, names in _RANGES
            for name in names.split()
            if getattr(self, name) is not None and not ok(getattr(self, name))
        ]
        for name in ("micro_batch_tokens", "val_chunk_tokens"):
            value = getattr(self, name)
            if self.block_size > 0 and value % self.block_size:
                near = max(value // self.block_size, 1) * self.block_size
                problems.append(f"{name}={value} is not a multiple of block_size={self.block_size}; try {near}")
        for setting_field in dataclasses.fields(self):
            choices, value = setting_field.metadata["choices"], getattr(self, setting_field.name)
            if choices and value not in choices:
                problems.append(f"{setting_field.name}={value!r} is not one of {', '.join(choices)}")
        if self.name is not None and not re.fullmatch(r"(?!\.)[^/\0]{1,200}", self.name):
            problems.append(
                f"name={self.name[:40]!r} is no name for a folder inside out; it may hold no / and no leading dot"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.micro_batch_tokens * self.micro_batches


_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "at most 2^53",
        lambda value: value <= LARGEST,
        "iterations epochs val_tokens val_every save_every keep_every momentum_warmup",
    ),
    ("at most 2^31", lambda value: value <= 2**31, "block_size window_tokens micro_batch_tokens val_chunk_tokens"),
    (
        "at most 2^20",
        lambda value: value <= 2**20,
        "width base_width head_dim micro_batches pack keep_last kernel_warmup",
    ),
    ("at most 4096", lambda value: value <= 4096, "n_layer"),  # nothing is allocated yet, but every layer is built
    (
        "at least 1",
        lambda value: value >= 1,
        "width base_width n_layer head_dim block_size window_tokens iterations micro_batch_tokens micro_batches epochs "
        "val_tokens val_chunk_tokens",
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        "pack seed momentum_warmup val_every save_every keep_every kernel_warmup",
    ),
    ("finite and at least 0", lambda value: 0 <= value < float("inf"), "weight_decay"),
    ("at least 2", lambda value: value >= 2, "keep_last"),
    (
        "positive and finite",
        lambda value: 0 < value < float("inf"),
        "matrix_lr embed_lr head_lr scalar_lr lr_scale adam_eps scalar_eps timeout_s",
    ),
    ("in [0, 1)", lambda value: 0 <= value < 1, "adam_beta1 adam_beta2 momentum momentum_start"),
    ("in [0, 1]", lambda value: 0 <= value <= 1, "cooldown lr_floor"),
)


@dataclass(frozen=True)
class Preset:
    """A complete set of settings and what it costs: hardware, minutes, and the loss to expect from which tokens.

    base_width: the width that its learning rates were tuned at, for runs with muP.
    """

    about: str
    base_width: int
    tokenizer: str
    expected_loss: float
    settings: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    "laptop": Preset(
        "width 128, 6 layers, bytes of Python source; 2 CPU cores, about a minute",
        64,
        "byte",
        1.63,
        {
            "width": 128,
            "n_layer": 6,
            "head_dim": 32,
            "block_size": 64,
            "window_tokens": 256,
            "iterations": 200,
            "micro_batch_tokens": 256,
            "micro_batches": 8,
            "scalar_eps": 1e-3,
            "momentum": 0.85,
            "data_order": "shuffled",
            "val_tokens": 131_072,
            "val_chunk_tokens": 4096,
            "val_every": 50,
            "kernel_warmup": 0,
            "compile": False,  # over in 10 s on an H100, where compiling takes longer
        },
    ),
    "record26": Preset(
        "record 26 as published, width 768, 12 layers, FineWeb; 8xH100, about 3 minutes, validation loss 3.28",
        768,
        "gpt2",
        3.28,
        {},
    ),
}


def make_config(preset: str, overrides: Mapping[str, Any]) -> TrainConfig:
    """The preset with `overrides` on top.

    muP is on if a rule table or a base width asks for it, under every preset alike: a base width alone means muP, and a
    rule table alone takes the preset's base width. With neither, the rules are the record's own.
    """
    settings = {**PRESETS[preset].settings, **overrides}
    if settings.get("base_width") is not None:
        settings.setdefault("parametrization", "mup")
    elif "parametrization" in settings:
        settings["base_width"] = PRESETS[preset].base_width
    return TrainConfig(**settings)


def rules_in_force(cfg: TrainConfig) -> str:
    """How this run scales with width, as a line for its reader."""
    base, name = cfg.base_width or cfg.width, "muP" if cfg.parametrization == "mup" else cfg.parametrization
    if cfg.parametrization == "record26":
        return "rules: the record's own (no muP; --mup switches it on)"
    own = ", the width of this model: every factor is 1" if base == cfg.width else ""
    return f"rules: {name} from base width {base}{own}"


def _value_type(hint: Any) -> Any:
    """int | None -> int."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return hint


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_settings(parser: Parser, leave_out: Iterable[str] = ()) -> None:
    """Give `parser` one flag per setting, grouped. A flag that is not given leaves no trace in the parsed namespace.

    leave_out: settings, or "all run" for the whole group "run".
    """
    hints = typing.get_type_hints(TrainConfig)
    groups: dict[str, Any] = {}
    for setting_field in dataclasses.fields(TrainConfig):
        name, meta = setting_field.name, setting_field.metadata
        if name in leave_out or f"all {meta['group']}" in leave_out:
            parser.elsewhere |= {_flag(name), *meta["shorthand"]}
            continue
        group = groups.setdefault(meta["group"], None) or parser.add_argument_group(meta["group"])
        groups[meta["group"]] = group
        if meta["shorthand"]:
            group = group.add_mutually_exclusive_group()
        values = {key: preset.settings.get(name, setting_field.default) for key, preset in PRESETS.items()}
        same = len(set(values.values())) == 1
        shown = str(setting_field.default) if same else ", ".join(f"{key}: {value}" for key, value in values.items())
        text = meta["help"] if "(default" in meta["help"] else f"{meta['help']} ({shown})"
        kind = _value_type(hints[name])
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if kind is bool:
            group.add_argument(_flag(name), action=argparse.BooleanOptionalAction, **options)
        else:
            extra = (
                {"choices": meta["choices"]} if meta["choices"] else {"type": kind, "metavar": kind.__name__.upper()}
            )
            group.add_argument(_flag(name), **options, **extra)
        for flag, value in meta["shorthand"].items():
            group.add_argument(
                flag,
                dest=name,
                action="store_const",
                const=value,
                default=argparse.SUPPRESS,
                help=f"= {_flag(name)} {value}",
            )


def add_preset(parser: argparse.ArgumentParser) -> None:
    """The --preset flag."""
    about = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    parser.add_argument(
        "--preset", choices=("auto", *PRESETS), default="auto", help=f"auto is record26 on CUDA, else laptop. {about}"
    )


def to_json(cfg: TrainConfig) -> str:
    """The settings as strict JSON."""
    return json.dumps(dataclasses.asdict(cfg), indent=1, allow_nan=False)


def from_json(text: str, source: Path) -> TrainConfig:
    """Read back `to_json`. ConfigError naming `source` for anything that is not a TrainConfig."""
    try:
        values = json.loads(text)
        hints = typing.get_type_hints(TrainConfig)
        for name, value in values.items():
            kind = _value_type(hints[name])
            optional = isinstance(hints[name], types.UnionType)
            fits = type(value) is kind or (kind is float and type(value) is int) or (value is None and optional)
            if not fits:
                raise TypeError(f"{name}={value!r} should be {kind.__name__}")
        return TrainConfig(**values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as fault:
        raise ConfigError(f"{source} is not a valid config ({fault}); restore it or start a new run") from None
