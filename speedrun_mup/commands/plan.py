"""`speedrun-mup plan`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from speedrun_mup.commands.sweep import add_engine, budget_of, take
from speedrun_mup.commands.train import STOPPED_BY_SIGNAL
from speedrun_mup.config import PRESETS, add_settings, make_config
from speedrun_mup.flags import new_parser, parse


def run(argv: Sequence[str]) -> int:
    """Choose the small runs that find a big run's learning rate within a budget; with --run, run them and predict."""
    parser = new_parser("speedrun-mup plan", run.__doc__ or "")
    group = parser.add_argument_group("plan")
    group.add_argument("--run", action="store_true", help="carry it out; the same command again goes on")
    group.add_argument("--out", metavar="DIR", help="the plan's folder (default: plans/width-WIDTH)")
    group.add_argument("--preset", choices=tuple(PRESETS), default="laptop", help="the rest of the target's settings")
    add_engine(parser, "; 10%% of the target's FLOPs")
    add_settings(parser, leave_out=("micro_batch", "out", "name", "resume"))
    flags = vars(parse(parser, argv))
    budget = budget_of(flags.pop("budget"))
    engine = take(flags, "engine", "workers")
    carry_out, out, preset = flags.pop("run"), flags.pop("out"), flags.pop("preset")
    target = make_config(preset, flags)

    from speedrun_mup.plan import make_plan, planned, predict, run_plan
    from speedrun_mup.sweep import open_engine

    folder = Path(out or f"plans/width-{target.width}")
    with closing(open_engine(**engine, device=target.device)) as where:
        plan = planned(target, folder, budget) or make_plan(target, folder, where, **budget)
        print(plan.summary())
        print(f"plan  {folder / 'plan.json'}")
        if not carry_out:
            return 0
        result = run_plan(plan, folder, where, progress=target.progress)
    print(result.summary())
    if not result.complete and not result.used_up:
        return STOPPED_BY_SIGNAL if result.stopped else 1
    prediction = predict(folder)
    print(prediction.summary())
    print(f"next  train the target with --lr-scale {prediction.lr_scale:.4g}, then")
    print(f"      speedrun-mup report {folder} --target runs/NAME tells whether it came true")
    return 0
