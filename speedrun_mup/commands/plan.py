"""`speedrun-mup plan`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from speedrun_mup.commands.sweep import add_engine, budget_of, take
from speedrun_mup.commands.train import STOPPED_BY_SIGNAL
from speedrun_mup.config import PRESETS, TrainConfig, make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.flags import new_parser, parse
from speedrun_mup.scaling import rules_in_force
from speedrun_mup.setting_flags import TRAINING, add_settings

if TYPE_CHECKING:
    from speedrun_mup.plan import Plan
    from speedrun_mup.sweep import Engine


def run(argv: Sequence[str]) -> int:
    """Choose the small runs that find a big run's learning rate within a budget; with --run, run them and predict.

    Without --run and --out nothing is written: ask as often as you like.
    """
    parser = new_parser("speedrun-mup plan", run.__doc__ or "")
    group = parser.add_argument_group("plan")
    group.add_argument("--run", action="store_true", help="run the planned sweep; rerun the command to resume it")
    group.add_argument("--out", metavar="DIR", help="folder to keep the plan in (with --run: plans/width-WIDTH)")
    group.add_argument("--preset", choices=tuple(PRESETS), default="laptop", help="preset for all settings not given")
    group.add_argument("--json", action="store_true", help="the plan and the designs considered, as JSON")
    add_engine(parser, "; 10%% of the target's FLOPs")
    add_settings(parser, groups=("scaling", *TRAINING, "display"), plus=("seed", "val_every"))
    flags = vars(parse(parser, argv))
    budget = budget_of(flags.pop("budget"))
    engine = take(flags, "engine", "workers")
    carry_out, out, preset, as_json = (flags.pop(name) for name in ("run", "out", "preset", "json"))
    if carry_out and as_json:
        raise ConfigError("--json is for a plan that is not run yet; leave out --run")
    target = make_config(preset, flags)
    say(*_opening(target))

    from speedrun_mup.plan import NoPlanFits, predict, run_plan
    from speedrun_mup.sweep import open_engine

    folder = Path(out or f"plans/width-{target.width}")
    with closing(open_engine(**engine, device=target.device)) as where:
        try:
            plan, designs = _choose(target, folder, where, budget, keep=carry_out or out is not None)
        except NoPlanFits as fault:
            raise ConfigError(f"{fault}; enough is: {_with_budget(argv, fault.enough)}") from None
        print(_as_json(plan, designs) if as_json else _as_text(plan, designs))
        if carry_out or out is not None:
            say(f"plan  {folder / 'plan.json'}")
        if not carry_out:
            say("next  the same command with --run trains the proxies and predicts")
            return 0
        result = run_plan(plan, folder, where, progress=target.progress)
    print(result.summary())
    if not result.complete and not result.used_up:
        return STOPPED_BY_SIGNAL if result.stopped else 1
    prediction = predict(folder)
    print(prediction.summary())
    print(f"next  train the target with --lr-scale {prediction.lr_scale:.4g}, then")
    print(f"      speedrun-mup report {folder} --target runs/NAME compares prediction and result")
    return 0


def say(*lines: str) -> None:
    """What is not the result goes to stderr, at once."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def _opening(target: TrainConfig) -> list[str]:
    """Said before anything slow begins."""
    lines = [rules_in_force(target)]
    if target.base_width is None:
        lines.append(f"proxies: muP from base width {target.width}, the target's own, where all rules are one")
    steps = target.schedule.describe()
    return [*lines, f"choosing proxies for width {target.width}, {target.n_layer} layers, {steps}"]


def _choose(
    target: TrainConfig, folder: Path, engine: Engine, budget: dict[str, float], keep: bool
) -> tuple[Plan, list[Plan]]:
    """The plan in `folder` if it answers, else a new one, written there if it is to be kept; and what else there is."""
    from speedrun_mup.plan import Budget, choose_plan, load_plan, save_plan

    if keep or not budget:
        plan = load_plan(target, folder, budget)
        if plan:
            return plan, []
    limits = Budget(**{name.removeprefix("budget_"): amount for name, amount in budget.items()})
    plan, designs = choose_plan(target, folder, engine, limits, say)
    if keep:
        save_plan(plan, folder, limits)
    return plan, designs


def _as_text(plan: Plan, designs: list[Plan]) -> str:
    from speedrun_mup.plan import design_table

    table = [f"\ndesigns (* is the plan; a larger --budget buys a lower line):\n{design_table(designs, plan)}"]
    return "\n".join([plan.summary(), *(table if designs else [])])


def _as_json(plan: Plan, designs: list[Plan]) -> str:
    told = [{key: value for key, value in asdict(each).items() if key != "target"} for each in (plan, *designs)]
    return json.dumps({"target": asdict(plan.target), "plan": told[0], "designs": told[1:]}, indent=1, allow_nan=False)


def _with_budget(argv: Sequence[str], budget: str) -> str:
    """The same command line with another --budget."""
    words = list(argv)
    while "--budget" in words:
        at = words.index("--budget")
        del words[at : at + 2]
    words = [word for word in words if not word.startswith("--budget=")]
    return shlex.join(["speedrun-mup", "plan", *words, "--budget", budget])
