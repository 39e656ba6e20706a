"""`speedrun-mup sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from speedrun_mup.commands.train import STOPPED_BY_SIGNAL
from speedrun_mup.config import PRESETS, TrainConfig, make_config, swept_settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.flags import new_parser, parse, several, whole_number
from speedrun_mup.scaling import SCALING_SETTINGS, scaling_in_force
from speedrun_mup.setting_flags import TRAINING, add_renamed_flag, add_settings
from speedrun_mup.settings import flag_of


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
    """Find the best learning rate, or another hyperparameter, at several widths or other sizes; rerun it to resume."""
    parser = new_parser("speedrun-mup sweep", run.__doc__ or "")
    group = parser.add_argument_group("sweep")
    _add_sizes(group)
    _add_grid(group)
    add_renamed_flag(parser, "--knob", "--hyperparameter")
    add_engine(parser)
    add_settings(parser, groups=(*TRAINING, "display"), plus=("base_width", "parametrization", *SCALING_SETTINGS))
    flags = vars(parse(parser, argv))
    budget = budget_of(flags.pop("budget"))
    if "budget_share" in budget:
        raise ConfigError("--budget in percent is for a plan, which has a target run; give a time or FLOPs")
    engine = take(flags, "engine", "workers")
    sizes = _sizes(**take(flags, "widths", "axis", "values"))
    asked = argparse.Namespace(
        **take(flags, "arms", "octaves", "seeds", "hyperparameter", "adaptive", "out", "preset", "hold")
    )

    from speedrun_mup.sweep import Sweep, check_given, grid_of, open_engine, pick_arms, run_sweep, write_csv
    from speedrun_mup.transfer import Axes

    out, arms, seeds = Path(asked.out), pick_arms(asked.arms), tuple(asked.seeds)
    rules = {"parametrization": "mup"} | flags  # for its base width: every arm is a rule table
    cfg = make_config(asked.preset, rules, [arm.settings for arm in arms])
    check_given(arms, flags)
    if len(sizes) > 1 and len(sizes.get("width", ())) == 1:
        cfg = replace(cfg, width=sizes.pop("width")[0])
    elif "width" not in sizes:
        cfg = replace(cfg, width=cfg.tuned_width)  # where its rates were tuned
    held = _held_tokens(asked.hold, sizes, cfg)
    _check_free(flags, sizes, held)
    if seeds == (0,):
        raise ConfigError("--seeds 0 is no run; give how many, 1 or more, or the seeds themselves, such as 0,1")
    if len(seeds) == 1:  # so many
        seeds = tuple(range(min(seeds[0], 10**4)))
    axes = Axes(next(iter(sizes)), asked.hyperparameter)
    places: tuple[Any, ...] = tuple(sizes[axes.size]) if len(sizes) == 1 else grid_of(sizes)
    sweep = Sweep(cfg, places, arms, tuple(asked.octaves), seeds, axes, asked.adaptive, held_tokens=held)
    print(f"rules: {', '.join(arm.name for arm in arms)} from base width {cfg.base_width}{scaling_in_force(cfg)}")
    print("\n".join(sweep.told()))
    with closing(open_engine(**engine, device=cfg.device)) as where:
        limits: dict[str, Any] = dict(budget)
        result = run_sweep(sweep, out, where, **limits, progress=cfg.progress)
    write_csv(out, out / "runs.csv")
    print(result.summary())
    print(f"table  {out / 'runs.csv'}")
    if result.complete:
        print(f"next   speedrun-mup transfer {out}; speedrun-mup report {out}")
    return STOPPED_BY_SIGNAL if result.stopped else int(not result.complete)


def _add_grid(group: Any) -> None:
    """The flags that say which runs are made at every size, and where."""
    group.add_argument(
        "--arms",
        **several(str),
        default=["mup"],
        metavar="ARM",
        help="parametrizations, %(default)s; ARM+SETTING=VALUE is one with settings of its own, "
        "a control if its rates follow another rule",
    )
    grid = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    group.add_argument("--octaves", **several(float), default=grid, metavar="K", help="the hyperparameter times 2^K")
    group.add_argument(
        "--seeds", **several(int), default=[3], metavar="INT", help="runs at every point, 3; or these seeds: 0,1,2"
    )
    group.add_argument(
        "--hyperparameter",
        default="lr_scale",
        metavar="NAME",
        help=f"one of {', '.join(swept_settings())}; or one factor on several: A+B; adam_lr and muon_lr are the rates of all "
        "groups of parameters with that optimizer; default: %(default)s, a factor on all learning rates",
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
