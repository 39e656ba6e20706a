"""`speedrun-mup sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from speedrun_mup.commands.train import STOPPED_BY_SIGNAL
from speedrun_mup.config import PRESETS, make_config, swept_settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.flags import new_parser, parse, several
from speedrun_mup.setting_flags import TRAINING, add_renamed_flag, add_settings


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
    """Find the best learning rate, or another hyperparameter, at several widths; rerun the command to resume it."""
    parser = new_parser("speedrun-mup sweep", run.__doc__ or "")
    group = parser.add_argument_group("sweep")
    group.add_argument("--widths", **several(int), required=True, metavar="W", help="three or more for a verdict")
    group.add_argument("--arms", **several(str), default=["mup"], metavar="ARM", help="parametrizations; %(default)s")
    grid = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    group.add_argument("--octaves", **several(float), default=grid, metavar="K", help="the hyperparameter times 2^K")
    group.add_argument(
        "--seeds", **several(int), default=[3], metavar="INT", help="runs at every point, 3; or these seeds: 0,1,2"
    )
    group.add_argument(
        "--hyperparameter",
        default="lr_scale",
        metavar="NAME",
        help=f"one of {', '.join(swept_settings())}; default: %(default)s, a factor on all learning rates",
    )
    group.add_argument(
        "--adaptive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="extend the grid where the best point is at its edge, and refine it around the best point",
    )
    group.add_argument("--out", default="sweeps/sweep", metavar="DIR", help="the sweep's folder; %(default)s")
    group.add_argument("--preset", choices=tuple(PRESETS), default="laptop", help="preset for all settings not given")
    add_renamed_flag(parser, "--knob", "--hyperparameter")
    add_engine(parser)
    add_settings(parser, groups=(*TRAINING, "display"), plus=("base_width", "parametrization"))
    flags = vars(parse(parser, argv))
    budget = budget_of(flags.pop("budget"))
    if "budget_share" in budget:
        raise ConfigError("--budget in percent is for a plan, which has a target run; give a time or FLOPs")
    engine = take(flags, "engine", "workers")
    asked = argparse.Namespace(
        **take(flags, "widths", "arms", "octaves", "seeds", "hyperparameter", "adaptive", "out", "preset")
    )

    from speedrun_mup.sweep import Sweep, check_given, open_engine, pick_arms, run_sweep, write_csv
    from speedrun_mup.transfer import Axes

    out, arms, seeds = Path(asked.out), pick_arms(asked.arms), tuple(asked.seeds)
    rules = {"parametrization": "mup"} | flags  # for its base width: every arm is a rule table
    cfg = make_config(asked.preset, rules, [arm.settings for arm in arms])
    check_given(arms, flags)
    if len(seeds) == 1:  # so many
        seeds = tuple(range(min(seeds[0], 10**4)))
    axes = Axes("width", asked.hyperparameter)
    sweep = Sweep(cfg, tuple(asked.widths), arms, tuple(asked.octaves), seeds, axes, asked.adaptive)
    print(f"rules: {', '.join(arm.name for arm in arms)} from base width {cfg.base_width}")
    with closing(open_engine(**engine, device=cfg.device)) as where:
        limits: dict[str, Any] = dict(budget)
        result = run_sweep(sweep, out, where, **limits, progress=cfg.progress)
    write_csv(out, out / "runs.csv")
    print(result.summary())
    print(f"table  {out / 'runs.csv'}")
    if result.complete:
        print(f"next   speedrun-mup transfer {out}; speedrun-mup report {out}")
    return STOPPED_BY_SIGNAL if result.stopped else int(not result.complete)
