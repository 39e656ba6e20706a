"""`speedrun-mup ablate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from speedrun_mup.commands.sweep import add_engine, budget_of, take
from speedrun_mup.commands.train import STOPPED_BY_SIGNAL
from speedrun_mup.config import PRESETS, make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import strict_json, write_whole
from speedrun_mup.flags import new_parser, parse, several
from speedrun_mup.setting_flags import TRAINING, add_settings


def run(argv: Sequence[str]) -> int:
    """Which techniques pay, and does the gain survive width? Each added and left out, at its best rate; rerun to resume."""
    parser = new_parser("speedrun-mup ablate", run.__doc__ or "")
    _add_flags(parser.add_argument_group("ablation"))
    add_engine(parser)
    add_settings(parser, groups=(*TRAINING, "display"), plus=("base_width", "parametrization"))
    flags = vars(parse(parser, argv))
    budget: dict[str, Any] = budget_of(flags.pop("budget"))
    if "budget_share" in budget:
        raise ConfigError("--budget in percent is for a plan, which has a target run; give a time or FLOPs")
    engine = take(flags, "engine", "workers")
    asked = argparse.Namespace(**take(flags, "techniques", "design", "widths", "octaves", "seeds", "out", "preset"))
    cfg = make_config(asked.preset, {"parametrization": "mup"} | flags)

    from speedrun_mup.ablate.design import design_of, techniques_of, told
    from speedrun_mup.ablate.measure import measure, summary, to_json
    from speedrun_mup.sweep import Sweep, open_engine, run_sweep, write_csv

    cfg, out, seeds = replace(cfg, width=cfg.tuned_width), Path(asked.out), tuple(asked.seeds)
    seeds = tuple(range(min(seeds[0], 10**4))) if len(seeds) == 1 else seeds
    if len(seeds) < 2:
        raise ConfigError("--seeds: give two at least; one says nothing of noise")
    techniques = techniques_of(asked.techniques, cfg)
    design = design_of(techniques, cfg, asked.design)
    sweep = Sweep(cfg, tuple(sorted(asked.widths)), design.arms, tuple(asked.octaves), seeds, refine=False)
    print("\n".join([*told(design, techniques), *sweep.told()]))
    with closing(open_engine(**engine, device=cfg.device)) as where:
        result = run_sweep(sweep, out, where, **budget, progress=cfg.progress)
    write_csv(out, out / "runs.csv")
    if not result.complete:
        print(result.summary())
        return STOPPED_BY_SIGNAL if result.stopped else 1
    found = measure(result.results, design, sorted(asked.widths), seeds)
    write_whole(out / "ablation.json", strict_json(to_json(found), indent=1) + "\n", "make room and run it again")
    print(f"{len(result.results)} runs, {result.ran} of them now, {result.flops:.3g} FLOPs")
    print(summary(found))
    print(f"table  {out / 'runs.csv'}; numbers  {out / 'ablation.json'}")
    return 0


def _add_flags(group: Any) -> None:
    """The flags that say what is trained."""
    group.add_argument(
        "--techniques",
        **several(str),
        default=["all"],
        metavar="NAME",
        help="techniques, optimizers for the hidden matrices, or SETTING=VALUE, several settings with + between; all: every "
        "technique that says how an ablation has it; %(default)s",
    )
    group.add_argument(
        "--design",
        choices=("both", "add", "leave"),
        default="both",
        help="add each to the base, leave each out of all of them, or both; %(default)s",
    )
    group.add_argument("--widths", **several(int), default=[64, 128, 256], metavar="W", help="64 128 256")
    group.add_argument(
        "--octaves",
        **several(float),
        default=[-1.0, 0.0, 1.0],
        metavar="K",
        help="grid of every arm: all learning rates times 2^K, and further where the best is at an end; -1 0 1",
    )
    group.add_argument("--seeds", **several(int), default=[3], metavar="INT", help="seeds of every arm, 3; or 0,1,2")
    group.add_argument("--out", default="sweeps/ablation", metavar="DIR", help="the ablation's folder; %(default)s")
    group.add_argument("--preset", choices=tuple(PRESETS), default="laptop", help="preset for all settings not given")
