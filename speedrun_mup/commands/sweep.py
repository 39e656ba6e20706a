"""`speedrun-mup sweep`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from speedrun_mup.commands.train import STOPPED_BY_SIGNAL
from speedrun_mup.config import PRESETS, add_settings, make_config, new_parser, parse

NOT_OF_A_SWEEP = ("width", "seed", "out", "name", "resume", "save", "save_every", "keep_last", "track", "val_every")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the flags that say where cells run and what they may cost."""
    group = parser.add_argument_group("where and how much")
    group.add_argument("--engine", choices=("local", "ray"), default="local", help="%(default)s")
    group.add_argument("--workers", type=int, metavar="INT", help="cells at a time (default: one per GPU, or per core)")
    group.add_argument("--budget-minutes", type=float, metavar="FLOAT", help="for this call")
    group.add_argument("--budget-flops", type=float, metavar="FLOAT", help="for all cells of the folder together")


def take(flags: dict[str, Any], *names: str) -> dict[str, Any]:
    """Remove `names` from `flags` and return them."""
    return {name: flags.pop(name) for name in names}


def run(argv: Sequence[str]) -> int:
    """Find the best learning rate at several widths; the same command again does what is missing."""
    parser = new_parser("speedrun-mup sweep", run.__doc__ or "")
    group = parser.add_argument_group("sweep")
    group.add_argument("--widths", type=int, nargs="+", required=True, metavar="W", help="three or more for a verdict")
    group.add_argument(
        "--arms", nargs="+", default=["mup"], metavar="ARM", help="ways to scale with width; %(default)s"
    )
    grid = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    group.add_argument("--octaves", type=float, nargs="+", default=grid, metavar="K", help="the knob times 2^K")
    group.add_argument("--seeds", type=int, default=3, metavar="INT", help="runs at every point; %(default)s")
    group.add_argument("--knob", default="lr_scale", help="learning rate to turn; %(default)s turns all of them")
    group.add_argument(
        "--adaptive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="extend the grid where the best point is at its edge, and refine it around the best point",
    )
    group.add_argument("--out", default="sweeps/sweep", metavar="DIR", help="the sweep's folder; %(default)s")
    group.add_argument("--preset", choices=tuple(PRESETS), default="laptop", help="the rest of the settings")
    add_engine(parser)
    add_settings(parser, leave_out=NOT_OF_A_SWEEP)
    flags = vars(parse(parser, argv))
    budget = take(flags, "budget_minutes", "budget_flops")
    engine = take(flags, "engine", "workers")
    asked = argparse.Namespace(**take(flags, "widths", "arms", "octaves", "seeds", "knob", "adaptive", "out", "preset"))
    cfg = make_config(asked.preset, flags)

    from speedrun_mup.sweep import Sweep, open_engine, pick_arms, run_sweep, write_csv

    out, arms, seeds = Path(asked.out), pick_arms(asked.arms), tuple(range(asked.seeds))
    sweep = Sweep(cfg, tuple(asked.widths), arms, tuple(asked.octaves), seeds, asked.knob, asked.adaptive)
    with closing(open_engine(**engine, device=cfg.device)) as where:
        result = run_sweep(sweep, out, where, **budget, progress=cfg.progress)
    write_csv(out, out / "runs.csv")
    print(result.summary())
    print(f"table  {out / 'runs.csv'}")
    if result.complete:
        print(f"next   speedrun-mup transfer {out}; speedrun-mup report {out}")
    return STOPPED_BY_SIGNAL if result.stopped else int(not result.complete)
