"""`speedrun-mup train`, which is also train.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speedrun_mup.config import GROUPS, PRESETS, TrainConfig, build, computed_settings, make_config, settings
from speedrun_mup.core.errors import ConfigError, Stopped, UserError
from speedrun_mup.files import printable
from speedrun_mup.flags import Parser, new_parser, parse
from speedrun_mup.setting_flags import add_preset, add_settings

if TYPE_CHECKING:
    from speedrun_mup.training.run import TrainResult
    from speedrun_mup.training.run_folder import FolderLock

STOPPED_BY_SIGNAL = Stopped.exit_code

ABOUT = "Train record 26 of the modded-nanogpt speedrun at any width, with or without muP."


def train_parser(prog: str = "speedrun-mup train", about: str = ABOUT) -> Parser:
    """The flags of training, for a command that takes them."""
    parser = new_parser(prog, about)
    add_preset(parser)
    add_settings(parser, GROUPS)
    return parser


def config_from_flags(flags: dict[str, object]) -> TrainConfig:
    """The settings that the flags ask for: those of the run to resume, or of the preset, with the given ones on top."""
    return settle(flags)[0]


def settle(flags: dict[str, object]) -> tuple[TrainConfig, FolderLock | None]:
    """The same; with `--resume auto`, rank 0 also holds the lock of the run that it took, so that no other job takes it."""
    from speedrun_mup.core.utils import pick_device
    from speedrun_mup.training.run_folder import newest_finished, run_of_launch, saved_config
    from speedrun_mup.training.tracking import CONFIG

    preset, lock = str(flags.pop("preset")), None
    out, name = Path(str(flags.get("out", TrainConfig.out))), flags.get("name")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # torchrun lost a rank and restarted
    if flags.get("resume") and "init_from" in flags:
        raise ConfigError("--init-from begins a new run, --resume continues one; leave out one of them")
    if restarted and flags.get("resume", "auto") == "auto" and (own := run_of_launch(out)):
        flags["resume"] = str(own)
    elif flags.get("resume") == "auto":
        found: Path | None = out / str(name)
        if not name:
            found, lock = _claim(out, flags)
        if found and (found / CONFIG).is_file():
            flags["resume"] = str(found)
        else:
            del flags["resume"]
            if os.environ.get("RANK", "0") == "0":
                print(f"--resume auto: no unfinished run {f'{name} ' if name else ''}in {out}; starting a new one")
                if done := newest_finished(out):
                    print(f"the newest run there is finished: --resume {done} --iterations N makes it longer")
    elif "resume" in flags:
        other = ["--name"] * ("name" in flags) + ["--preset"] * (preset != "auto")
        if other:
            raise ConfigError(f"--resume {flags['resume']} continues that run as it is; leave out {', '.join(other)}")
    if "resume" in flags:
        saved = vars(saved_config(Path(str(flags["resume"]))))
        kept = {name: saved[name] for name in _fitted(flags)}
        if any(flags.get(name, size) != size for name, size in kept.items()) and os.environ.get("RANK", "0") == "0":
            told = ", ".join(f"{name}={size}" for name, size in kept.items())
            print(f"--fit-memory: the run keeps what it found at its start: {told}")
        return build(saved | flags | kept), lock
    if preset == "auto":
        device = pick_device(str(flags.get("device", "auto")))
        preset = "record26" if device.type == "cuda" else "laptop"
    cfg = make_config(preset, flags)
    if os.environ.get("RANK", "0") == "0":
        for note in filter(None, (other_base(preset, cfg, flags), other_tokens(preset, cfg, flags))):
            print(note)
    return cfg, None


def other_base(preset: str, cfg: TrainConfig, flags: Collection[str]) -> str:
    """A line where the preset's learning rates are taken for those of another base width than they were tuned at."""
    tuned = PRESETS[preset].base_width
    if cfg.base_width in (None, tuned) or _has_rates(flags):
        return ""
    return (
        f"note: the learning rates of preset {preset} were tuned at width {tuned}, not at --base-width {cfg.base_width}"
    )


def other_tokens(preset: str, cfg: TrainConfig, flags: Collection[str]) -> str:
    """A line where the preset's learning rates were tuned on other tokens than the corpus has. Raises ConfigError without one."""
    if cfg.data == "synthetic" or _has_rates(flags):
        return ""
    from speedrun_mup.data.corpus import find_corpus

    corpus, tuned = find_corpus(cfg.data, cfg.tokenizer)[0], PRESETS[preset].tokenizer
    if corpus.tokenizer == tuned:
        return ""
    have = f"{printable(corpus.tokenizer, 60)} ones with a vocabulary of {corpus.vocab_size:,}"
    return (
        f"note: the learning rates of preset {preset} were tuned on {tuned} tokens, not on {have}; the best may be several "
        "times larger or smaller: speedrun-mup plan finds them"
    )


def _has_rates(flags: Collection[str]) -> bool:
    """Whether learning rates were given, whatever the preset has."""
    return any(name.endswith("_lr") or name == "lr_scale" for name in flags)


def _claim(out: Path, flags: Mapping[str, object]) -> tuple[Path | None, FolderLock | None]:
    """The folder that `--resume auto` takes, which rank 0 chooses for all, and its lock on rank 0.

    A run belongs to the flags that were given; sizes that it found itself are its own.
    """
    from speedrun_mup.core.utils import join_world
    from speedrun_mup.training.run_folder import claim_unfinished

    own = _fitted(flags)
    wanted = {key: value for key, value in flags.items() if key not in own and not (own and key == "fit_memory")}
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    shared = {key: flags[key] for key in ("device", "timeout_s") if key in flags}
    strict = bool(flags.get("deterministic"))
    world = join_world(**shared, strict=strict) if several else None  # type: ignore[arg-type]
    lock = claim_unfinished(out, wanted, print) if world is None or world.is_main else None
    folder = lock.folder if lock else None
    return (world.from_main(folder) if world else folder), lock


def _fitted(flags: Mapping[str, object]) -> list[str]:
    """The sizes that --fit-memory, if it is given, decides on."""
    return [name for name, meta in settings().items() if meta.fitted and flags.get("fit_memory")]


def run(argv: Sequence[str]) -> int:
    """Train, draw the loss curve, and say where everything is."""
    result = train_and_report(*settle(vars(parse(train_parser(), argv))))
    return 0 if result.finished else STOPPED_BY_SIGNAL


def train_and_report(cfg: TrainConfig, lock: FolderLock | None = None) -> TrainResult:
    """Train, draw the loss curve, and print where everything is."""
    from speedrun_mup.report import plot_loss_curve
    from speedrun_mup.training.run import train

    result = train(cfg, lock=lock)
    if os.environ.get("RANK", "0") == "0":
        curve = result.folder / "loss.png"
        try:
            plot_loss_curve([result.folder], curve)
            drawn = f"loss curve  {printable(curve)}"
        except UserError as fault:  # the run is done, with or without a picture of it
            drawn = ""
            print(f"warning: {fault}", file=sys.stderr)
        print(f"{result.steps} steps, {result.tokens:,} tokens in {result.train_s:.1f} s of training")
        if result.finished:
            print(f"validation loss {result.val_loss:.4f}{_expected(cfg, result.corpus.tokenizer)}")
        print(f"checkpoint  {printable(result.folder / 'checkpoints' / f'step-{result.steps:08d}')}")
        if drawn:
            print(drawn)
        print(f"metrics     {printable(result.folder / 'metrics.jsonl')}")
        if result.corpus.tokenizer != "synthetic":
            print(f"text        speedrun-mup sample {printable(result.folder)}")
    return result


def _expected(cfg: TrainConfig, tokenizer: str) -> str:
    """What a preset promises, if the run is just that preset on its own kind of tokens."""
    for name, preset in PRESETS.items():
        usual = computed_settings(make_config(name, {}))
        changed = {key for key, value in computed_settings(cfg).items() if value != usual[key]}
        if preset.tokenizer == tokenizer and changed <= {"seed"}:
            return f"; expect about {preset.expected_loss:.2f}"
    return ""
