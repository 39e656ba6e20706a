"""The `speedrun-mup` command. Heavy imports wait until the flags are known to be right."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from speedrun_mup.config import PRESETS, TrainConfig, add_preset, add_settings, make_config, new_parser, parse
from speedrun_mup.core.errors import ConfigError, UserError

DEMO_WIDTHS = (32, 64, 128, 256)
STOPPED_BY_SIGNAL = 75  # EX_TEMPFAIL: a scheduler should start the command again with --resume


def train_parser(prog: str) -> argparse.ArgumentParser:
    """The flags of training."""
    parser = new_parser(prog, "Train record 26 of the modded-nanogpt speedrun at any width, with or without muP.")
    add_preset(parser)
    add_settings(parser)
    return parser


def config_of(flags: dict[str, object]) -> TrainConfig:
    """The settings that the flags ask for: those of the run to resume, or of the preset, with the given ones on top."""
    from speedrun_mup.core.utils import pick_device
    from speedrun_mup.training import newest_unfinished, saved_config

    preset, resume = str(flags.pop("preset")), flags.get("resume")
    if resume == "auto":
        out = Path(str(flags.get("out", TrainConfig.out)))
        found = newest_unfinished(out)
        if found is None:
            print(f"--resume auto: no unfinished run in {out}; starting a new one")
            del flags["resume"]
        else:
            flags["resume"] = str(found)
    if "resume" in flags:
        saved = saved_config(Path(str(flags["resume"])))
        return TrainConfig(**(vars(saved) | flags))
    if preset == "auto":
        device = pick_device(str(flags.get("device", "auto")))
        preset = "record26" if device.type == "cuda" else "laptop"
    return make_config(preset, flags)


def run_train(argv: Sequence[str], prog: str = "speedrun-mup train") -> int:
    """Train, draw the loss curve, and say where everything is."""
    cfg = config_of(vars(parse(train_parser(prog), argv)))
    from speedrun_mup.report import plot_loss_curve
    from speedrun_mup.training import train

    result = train(cfg)
    if os.environ.get("RANK", "0") == "0":
        curve = plot_loss_curve([result.folder], result.folder / "loss.png")
        print(f"{result.steps} steps, {result.tokens:,} tokens in {result.train_s:.1f} s of training")
        if result.finished:
            print(f"validation loss {result.val_loss:.4f}{_expected(cfg, result.corpus.tokenizer)}")
        print(f"checkpoint  {result.folder / 'checkpoints' / f'step-{result.steps:08d}'}")
        print(f"loss curve  {curve}")
        print(f"metrics     {result.folder / 'metrics.jsonl'}")
    return 0 if result.finished else STOPPED_BY_SIGNAL


def _expected(cfg: TrainConfig, tokenizer: str) -> str:
    """What a preset promises, if the run is just that preset on its own kind of tokens."""
    for name, preset in PRESETS.items():
        changed = {key for key, value in vars(make_config(name, {})).items() if value != getattr(cfg, key)}
        if preset.tokenizer == tokenizer and changed <= {"data", "out", "name", "resume", "seed", "track", "progress"}:
            return f"; expect about {preset.expected_loss:.2f}"
    return ""


def run_coord_check(argv: Sequence[str], prog: str = "speedrun-mup coord-check") -> int:
    """Check how every update scales with width, against controls that must fail. Exit code 0 only for PASS."""
    parser = new_parser(prog, run_coord_check.__doc__ or "")
    check_group = parser.add_argument_group("check")
    check_group.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], metavar="W", help="%(default)s")
    check_group.add_argument("--steps", type=int, default=6, help="optimizer steps; %(default)s")
    check_group.add_argument("--seeds", type=int, default=2, help="runs per width; %(default)s")
    check_group.add_argument("--tokens", type=int, default=512, help="of a step, at least the widest width; %(default)s")
    check_group.add_argument("--preset", choices=tuple(PRESETS), default="laptop", help="the rest of the settings")
    add_settings(parser, leave_out=("width", "iterations", "micro_batch_tokens", "micro_batches", "resume"))
    flags = vars(parse(parser, argv))
    check = {name: flags.pop(name) for name in ("widths", "steps", "seeds", "tokens")}
    cfg = make_config(flags.pop("preset"), flags)

    from speedrun_mup.coord_check import Verdict, gpt_coord_check

    result = gpt_coord_check(cfg, **check, progress=cfg.progress)
    folder = Path(cfg.out) / (cfg.name or "coord-check")
    folder.mkdir(parents=True, exist_ok=True)
    result.plot(folder / "coord-check.png")
    (folder / "coord-check.json").write_text(result.to_json() + "\n")
    print(result.summary())
    print(f"picture  {folder / 'coord-check.png'}")
    print(f"numbers  {folder / 'coord-check.json'}")
    return 0 if result.verdict is Verdict.PASS else 1


def run_explain(argv: Sequence[str]) -> int:
    """Print what muP comes to for every parameter: role, shape, init, multiplier, LR, eps, decay, at base and here."""
    parser = new_parser("speedrun-mup explain", run_explain.__doc__ or "")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="record26", help="the rest of the settings; %(default)s")
    parser.add_argument("--vocab", type=int, default=50257, help="of the tokenizer; %(default)s")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_settings(parser)
    flags = vars(parse(parser, argv))
    vocab, as_json = flags.pop("vocab"), flags.pop("json")
    if flags.get("base_width"):
        flags.setdefault("parametrization", "mup")
    cfg = make_config(flags.pop("preset"), flags)

    from speedrun_mup.explain import explain, table, to_json

    rows = explain(cfg, vocab)
    print(to_json(rows) if as_json else table(rows))
    return 0


def run_demo(argv: Sequence[str]) -> int:
    """The main job, small: train the laptop preset, then check that its learning rates hold at other widths."""
    parse(new_parser("speedrun-mup demo", run_demo.__doc__ or ""), argv)
    return run_train(["--preset", "laptop", "--data", "embedded"], "speedrun-mup demo") or run_coord_check(
        ["--data", "embedded", "--widths", *map(str, DEMO_WIDTHS), "--seeds", "1"], "speedrun-mup demo"
    )


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "demo": (run_demo, "the main job on the embedded corpus: minutes, offline, on a CPU"),
    "train": (run_train, "train a model"),
    "explain": (run_explain, "what the rules come to for every parameter of a model"),
    "coord-check": (run_coord_check, "do updates scale with width as muP says? with controls that must fail"),
}


def usage() -> str:
    """The list of commands."""
    lines = ["usage: speedrun-mup COMMAND [FLAGS]; speedrun-mup COMMAND --help tells more", ""]
    return "\n".join([*lines, *(f"  {name:<12} {about}" for name, (_, about) in COMMANDS.items())])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a UserError becomes one line on stderr and its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"error: unknown command {name}; choose {', '.join(COMMANDS)}", file=sys.stderr)
        return ConfigError.exit_code
    return guarded(lambda: COMMANDS[name][0](rest))


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`; a UserError is told in one line."""
    try:
        return work()
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return fault.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
