"""`speedrun-mup sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedrun_mup.commands.train import STOPPED_BY_SIGNAL
from speedrun_mup.config import PRESETS, TrainConfig, make_config, swept_settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.flags import new_parser, parse, several, whole_number
from speedrun_mup.scaling import SCALING_SETTINGS, scaling_in_force
from speedrun_mup.setting_flags import TRAINING, add_renamed_flag, add_settings
from speedrun_mup.settings import flag_of
from speedrun_mup.sweep_flags import COMMAND_FLAGS, ONLY_ARM, add_command_flags, pairs_of, seconds_of, with_file

if TYPE_CHECKING:
    from speedrun_mup.sweep import AnySweep, CommandSweep, Program


def add_engine(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Give `parser` the flags that say where runs are made and what they may cost. more: further kinds of budget."""
    group = parser.add_argument_group("execution and budget")
    group.add_argument("--engine", choices=("local", "ray"), default="local", help="%(default)s")
    group.add_argument("--workers", type=int, metavar="INT", help="runs at a time (default: one per GPU, or per core)")
    group.add_argument(
        "--budget", metavar="TIME|FLOPS", help=f"30m or 2h for this call; 1e15 FLOPs for the folder{more}"
    )


def budget_of(text: str | None) -> dict[str, float]:
    """Arguments of run_sweep and make_plan: minutes from 90s, 30m, 2h or 1d; FLOPs from 1e18; a share from 10%."""
    if text is None:
        return {}
    units = {"s": ("budget_minutes", 1 / 60), "m": ("budget_minutes", 1.0), "h": ("budget_minutes", 60.0)}
    units |= {"d": ("budget_minutes", 24 * 60.0), "%": ("budget_share", 0.01)}
    name, factor = units.get(text[-1:], ("budget_flops", 1.0))
    try:
        amount = float(text[: -1 if text[-1:] in units else None]) * factor
    except ValueError:
        amount = 0.0
    if not (1e6 if name == "budget_flops" else 0) < amount < float("inf"):  # 30 FLOPs are 30 minutes without the m
        raise ConfigError(f"--budget {text}: give a time such as 30m or 2h, FLOPs such as 1e18, or for a plan 10%")
    return {name: amount}


def take(flags: dict[str, Any], *names: str) -> dict[str, Any]:
    """Remove `names` from `flags` and return them."""
    return {name: flags.pop(name) for name in names}


def run(argv: Sequence[str]) -> int:
    """Find the best learning rate, or another hyperparameter, at several widths or other sizes; rerun it to resume.

    It trains this package's model, or whatever --run says.
    """
    parser = new_parser("speedrun-mup sweep", run.__doc__ or "")
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "file", nargs="?", metavar="FILE.toml", help="these flags as a file; comes first, if it is given"
    )
    _add_sizes(group)
    _add_grid(group)
    add_renamed_flag(parser, "--knob", "--hyperparameter")
    add_command_flags(parser)
    add_engine(parser)
    add_settings(parser, groups=(*TRAINING, "display"), plus=("base_width", "parametrization", *SCALING_SETTINGS))
    flags = vars(parse(parser, with_file(argv)))
    if (stray := flags.pop("file")) is not None:
        raise ConfigError(f"{stray}: a file with flags ends in .toml and comes first, right after sweep")
    budget = budget_of(flags.pop("budget"))
    if "budget_share" in budget:
        raise ConfigError("--budget in percent is for a plan, which has a target run; give a time or FLOPs")
    engine = take(flags, "engine", "workers")
    sizes = _sizes(**take(flags, "widths", "axis", "values"))
    asked = argparse.Namespace(
        **take(flags, "arms", "octaves", "seeds", "hyperparameter", "adaptive", "out", "preset", "hold", *COMMAND_FLAGS)
    )
    if asked.run or asked.arm:
        return _of_commands(asked, sizes, flags, engine, budget)
    if given := [name for name in COMMAND_FLAGS if getattr(asked, name)]:
        raise ConfigError(f"{flag_of(given[0])}: it is for a sweep of commands; give --run COMMAND too")

    from speedrun_mup.sweep import Sweep, check_given, grid_of, pick_arms
    from speedrun_mup.transfer import Axes

    asked.hyperparameter = asked.hyperparameter or "lr_scale"
    arms, seeds = pick_arms(asked.arms or ["mup"]), _seeds(asked.seeds)
    rules = {"parametrization": "mup"} | flags  # for its base width: every arm is a rule table
    cfg = make_config(asked.preset, rules, [arm.settings for arm in arms])
    check_given(arms, flags)
    if len(sizes) > 1 and len(sizes.get("width", ())) == 1:
        cfg = replace(cfg, width=sizes.pop("width")[0])
    elif "width" not in sizes:
        cfg = replace(cfg, width=cfg.tuned_width)  # where its rates were tuned
    held = _held_tokens(asked.hold, sizes, cfg)
    _check_free(flags, sizes, held)
    axes = Axes(next(iter(sizes)), asked.hyperparameter)
    places: tuple[Any, ...] = tuple(sizes[axes.size]) if len(sizes) == 1 else grid_of(sizes)
    sweep = Sweep(cfg, places, arms, tuple(asked.octaves), seeds, axes, asked.adaptive, held_tokens=held)
    print(f"rules: {', '.join(arm.name for arm in arms)} from base width {cfg.base_width}{scaling_in_force(cfg)}")
    return _carried_out(sweep, Path(asked.out), engine | {"device": cfg.device}, budget, cfg.progress)


def _seeds(given: Sequence[int]) -> tuple[int, ...]:
    """The seeds that --seeds means: so many, or these. Raises ConfigError for none."""
    if tuple(given) == (0,):
        raise ConfigError("--seeds 0 is no run; give how many, 1 or more, or the seeds themselves, such as 0,1")
    return tuple(range(min(given[0], 10**4))) if len(given) == 1 else tuple(given)


def _carried_out(
    sweep: AnySweep, out: Path, engine: Mapping[str, Any], budget: Mapping[str, Any], progress: bool
) -> int:
    """Run a sweep and say what came of it and what is next. Returns the exit code."""
    from speedrun_mup.sweep import open_engine, run_sweep, write_csv

    print("\n".join(sweep.told()))
    with closing(open_engine(**engine)) as where:
        result = run_sweep(sweep, out, where, **budget, progress=progress)
    write_csv(out, out / "runs.csv")
    print(result.summary())
    print(f"table  {out / 'runs.csv'}")
    if result.complete:
        print(f"next   speedrun-mup transfer {out}; speedrun-mup report {out}")
    return STOPPED_BY_SIGNAL if result.stopped else int(not result.complete)


def _of_commands(
    asked: argparse.Namespace,
    sizes: dict[str, list[int]],
    flags: dict[str, Any],
    engine: dict[str, Any],
    budget: dict[str, float],
) -> int:
    """A sweep whose runs are commands. flags: what else was given. Returns the exit code."""
    progress = flags.pop("progress", True)
    for name in flags:
        fix = f"write it into the command, or give --set {name}={flags[name]} for its {{{name}}}"
        raise ConfigError(f"{flag_of(name)} is a setting of this package's own model; {fix}")
    for name, instead in (("arms", "--arm NAME=COMMAND"), ("hold", "a --set FORMULA for what follows")):
        if getattr(asked, name):
            raise ConfigError(f"--{name} is for this package's own model; give {instead}")
    sweep = _command_sweep(asked, sizes)
    if "budget_flops" in budget and not (asked.flops or asked.params):
        raise ConfigError("--budget in FLOPs: nothing says how many a run takes; give a time, or --flops or --params")
    if asked.dry_run:
        print("\n".join(sweep.commands(Path(asked.out))))
        return 0
    return _carried_out(sweep, Path(asked.out), engine | {"device": "auto"}, budget, progress)


def _command_sweep(asked: argparse.Namespace, sizes: Mapping[str, Sequence[int]]) -> CommandSweep:
    """The sweep that the flags of commands ask for. Raises ConfigError."""
    from speedrun_mup.sweep import Arm, CommandSweep, grid_of
    from speedrun_mup.transfer import Axes

    program = program_of(asked)
    commands = {ONLY_ARM: asked.run} if asked.run else {}
    named = pairs_of("arm", asked.arm, "NAME=COMMAND")
    if asked.run and named:
        raise ConfigError("--run and --arm: give one command with --run, or all of them with --arm NAME=COMMAND")
    commands |= named
    axes = Axes(next(iter(sizes)), asked.hyperparameter or "lr")
    return CommandSweep(
        program,
        grid_of(sizes),
        tuple(Arm(name, {"command": command}) for name, command in commands.items()),
        tuple(asked.octaves),
        _seeds(asked.seeds),
        axes,
        asked.adaptive,
        controls=_controls(asked.controls, axes.size),
    )


def program_of(asked: argparse.Namespace) -> Program:
    """What the flags say of all commands. Raises ConfigError."""
    from speedrun_mup.sweep import Metric, Program

    if not asked.metric:
        raise ConfigError("--metric: say where the command's output has its loss, such as 'val loss {loss}'")
    formulas = pairs_of("set", asked.set, "NAME=NUMBER or NAME=FORMULA, such as iterations=500 or n_head=width//64")
    formulas |= {name: text for name in ("params", "flops") if (text := getattr(asked, name))}
    return Program(
        Metric(asked.metric, asked.metric_file),
        formulas,
        seconds_of("timeout", asked.timeout) if asked.timeout else None,
        asked.initial_loss,
        tuple(asked.diverged_exit),
        asked.shell,
        asked.keep,
        str(Path.cwd()),
    )


def _controls(text: str | None, size: str) -> dict[str, dict[str, float]]:
    """Arm -> size -> drift, from ARM=DRIFT or ARM:SIZE=DRIFT. Raises ConfigError."""
    found: dict[str, dict[str, float]] = {}
    for part in filter(None, (text or "").split(",")):
        name, _, drift = part.rpartition("=")
        arm, colon, over = name.strip().rpartition(":")
        try:
            found.setdefault(arm if colon else over, {})[over if colon else size] = float(drift)
        except ValueError:
            raise ConfigError(f"--controls {text}: give ARM=DRIFT,..., for instance sp=-1") from None
    return found


def _add_grid(group: Any) -> None:
    """The flags that say which runs are made at every size, and where."""
    group.add_argument(
        "--arms",
        **several(str),
        metavar="ARM",
        help="parametrizations, by default mup; ARM+SETTING=VALUE is one with settings of its own, "
        "a control if its rates follow another rule",
    )
    grid = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    group.add_argument("--octaves", **several(float), default=grid, metavar="K", help="the hyperparameter times 2^K")
    group.add_argument(
        "--seeds", **several(int), default=[3], metavar="INT", help="runs at every point, 3; or these seeds: 0,1,2"
    )
    group.add_argument(
        "--hyperparameter",
        metavar="NAME",
        help=f"one of {', '.join(swept_settings())}; or one factor on several: A+B; adam_lr and muon_lr are the rates of all "
        "groups of parameters with that optimizer; default: lr_scale, a factor on all learning rates; of a "
        "command any placeholder, lr if none is named",
    )
    group.add_argument(
        "--adaptive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="extend the grid where the best point is at its edge, and refine it around the best point",
    )
    group.add_argument("--out", default="sweeps/sweep", metavar="DIR", help="the sweep's folder; %(default)s")
    group.add_argument("--preset", choices=tuple(PRESETS), default="laptop", help="preset for all settings not given")


def _add_sizes(group: Any) -> None:
    """The flags that say what is scaled."""
    group.add_argument(
        "--widths",
        **several(int),
        metavar="W",
        help="the same as --axis width=W,W,W, three or more for a verdict; one, along another --axis, is held",
    )
    group.add_argument(
        "--axis",
        action="append",
        default=[],
        metavar="NAME[=V,V,V]",
        help="the size that is scaled: width, n_layer, batch_tokens (tokens of a step), tokens or iterations (of a run, at one "
        "batch), or another setting; again for a grid of several: --axis width=64,128 --axis n_layer=6,12",
    )
    group.add_argument("--values", **several(int), default=[], metavar="V", help="of the one --axis that has none")
    group.add_argument(
        "--hold",
        default="",
        metavar="iterations|tokens[=N]",
        help="what stays as batch_tokens changes: the steps of a run (default), or its tokens, so many or those of the settings, "
        "and the steps follow",
    )


def _sizes(widths: list[int] | None, axis: Sequence[str], values: Sequence[int]) -> dict[str, list[int]]:
    """Size axis -> values. Raises ConfigError for an axis without any, and for values without an axis."""
    sizes: dict[str, list[int]] = {} if widths is None else {"width": widths}
    for text in axis:
        name, _, given = text.partition("=")
        name = name.strip().lower().replace("-", "_")
        if name in sizes:
            raise ConfigError(f"--axis {text}: {name} is there twice; give all its values at once")
        sizes[name] = [_size(part, text) for part in given.split(",") if part.strip()]
    open_axes = [name for name, given in sizes.items() if not given]
    if values and len(open_axes) != 1:
        where = f"--axis {' and --axis '.join(open_axes)}" if open_axes else "no --axis without values"
        raise ConfigError(f"--values {' '.join(map(str, values))}: there is {where}; give --axis NAME=V,V,V")
    if values:
        sizes[open_axes.pop()] = list(values)
    if open_axes:
        raise ConfigError(f"--axis {open_axes[0]}: give its values, such as --axis {open_axes[0]} --values 6 12 24")
    if not sizes:
        raise ConfigError(
            "nothing is scaled; give --widths 32 64 128, or another size: --axis n_layer --values 6 12 24"
        )
    for name, some in sizes.items():
        if len(set(some)) == 1 and some is not widths:
            flag = "--widths" if name == "width" else flag_of(name)
            fixed = f", or hold it with {flag} {some[0]}" if len(sizes) > 1 else ""
            raise ConfigError(
                f"--axis {name}={some[0]}: one value shows no drift; give two or more, three for a verdict{fixed}"
            )
    return sizes


def _size(text: str, where: str) -> int:
    try:
        return whole_number(text.strip())
    except argparse.ArgumentTypeError as fault:
        raise ConfigError(f"--axis {where}: {fault}") from None


def _held_tokens(hold: str, sizes: Collection[str], cfg: TrainConfig) -> int | None:
    """Tokens of every run that --hold asks for; None where the steps stay."""
    what, _, amount = hold.partition("=")
    if not hold or hold == "iterations":
        return None
    if what != "tokens":
        raise ConfigError(f"--hold {hold}: give iterations, tokens, or tokens=N")
    if "batch_tokens" not in sizes:
        raise ConfigError(
            f"--hold {hold}: it is for --axis batch_tokens; along {', '.join(sizes)} all else stays anyway"
        )
    return _size(amount, f"batch_tokens with --hold {hold}") if amount else cfg.schedule.tokens


def _check_free(flags: Collection[str], sizes: Collection[str], held: int | None) -> None:
    """ConfigError for a setting that was given and that an axis changes."""
    from speedrun_mup.transfer.axes import size_axis

    for name in sizes:
        for setting in size_axis(name).changes:
            needed = setting == "micro_batches" and held is not None  # it says how many tokens are held
            if setting in flags and not needed:
                raise ConfigError(
                    f"{flag_of(setting)}: the sweep is over {name}; its values are those of --axis {name}"
                )
