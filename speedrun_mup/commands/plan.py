"""`speedrun-mup plan`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedrun_mup.commands.sweep import add_engine, budget_of, program_of, take
from speedrun_mup.commands.train import STOPPED_BY_SIGNAL, other_tokens
from speedrun_mup.config import PRESETS, TrainConfig, make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import printable, read_bytes
from speedrun_mup.flags import new_parser, parse, several, whole_number
from speedrun_mup.scaling import rules_in_force
from speedrun_mup.setting_flags import TRAINING, add_settings
from speedrun_mup.settings import flag_of
from speedrun_mup.sweep_flags import COMMANDS, PROGRAM_FLAGS, add_program_flags

if TYPE_CHECKING:
    from speedrun_mup.plan import Budget, JointPlan, Plan
    from speedrun_mup.sweep import Engine, SweepResult


SCALED = ("width", "n_layer", "batch_tokens", "tokens")  # sizes in which proxies may be smaller than the target


def run(argv: Sequence[str]) -> int:
    """Choose the small runs that find a big run's learning rate within a budget; with --run, run them and predict.

    Without --run and --out nothing is written: ask as often as you like.
    """
    parser = new_parser("speedrun-mup plan", run.__doc__ or "")
    _add_plan(parser)
    _add_command(parser)
    add_engine(parser, "; 10%% of the target's FLOPs")
    add_settings(parser, groups=("scaling", *TRAINING, "display"), plus=("seed", "val_every"))
    flags = vars(parse(parser, argv))
    budget = budget_of(flags.pop("budget"))
    engine = take(flags, "engine", "workers")
    carry_out, out, preset, as_json = (flags.pop(name) for name in ("run", "out", "preset", "json"))
    if carry_out and as_json:
        raise ConfigError("--json is for a plan that is not run yet; leave out --run")
    sizes = take(flags, "axes", "tokens", "batch_tokens", "priors")
    asked = argparse.Namespace(**take(flags, "target", "smallest", "hyperparameter", *PROGRAM_FLAGS))
    if isinstance(carry_out, str):
        return _of_command(carry_out, asked, flags, sizes, engine, budget, out)
    if given := [name for name, value in vars(asked).items() if value]:
        raise ConfigError(f"{flag_of(given[0])}: it is for a plan of a command; give --run COMMAND too")
    if names := _axes(flags, **{name: sizes[name] for name in ("axes", "tokens", "batch_tokens")}):
        if as_json:
            raise ConfigError("--json is for a plan over width alone; plan.json in --out has all of this one")
        target = make_config(preset, flags)
        say(*filter(None, [other_tokens(preset, target, flags)]))
        return _joint(argv, target, names, sizes, engine, budget, carry_out, out)
    target = make_config(preset, flags)
    say(*_opening(target))
    if other := other_tokens(preset, target, flags):
        say(other)

    from speedrun_mup.plan import predict, run_plan
    from speedrun_mup.sweep import open_engine

    folder, keep = Path(out or f"plans/width-{target.width}"), carry_out or out is not None
    with closing(open_engine(**engine, device=target.device)) as where:
        with _saying_what_is_enough(argv):
            plan, designs = _choose(target, folder, where, budget, keep)
        print(_as_json(plan, designs) if as_json else _as_text(plan, designs))
        _say_what_is_next(folder if keep else None, carry_out)
        if not carry_out:
            return 0
        result = run_plan(plan, folder, where, progress=target.progress)
    print(result.summary())
    if unfinished := _exit_code(result):
        return unfinished
    prediction = predict(folder)
    print(prediction.summary())
    name = f"{folder.resolve().name}-target"
    print(f"next  {_train_command(preset, flags | {'lr_scale': float(f'{prediction.lr_scale:.4g}'), 'name': name})}")
    print(f"      {shlex.join(['speedrun-mup', 'report', str(folder), '--target', f'runs/{name}'])}")
    return 0


def _add_command(parser: argparse.ArgumentParser) -> None:
    """The flags of a plan whose runs are commands."""
    group = parser.add_argument_group(COMMANDS)
    group.add_argument(
        "--target",
        metavar="NAME=SIZE",
        help="the size to plan for, if it is not --width: n_layer=24; proxies are smaller in it",
    )
    group.add_argument(
        "--smallest", type=whole_number, metavar="SIZE", help="below which no run makes sense, such as 32"
    )
    group.add_argument("--hyperparameter", metavar="NAME", help="the placeholder that is tuned; lr")
    add_program_flags(group)


def _of_command(
    command: str,
    asked: argparse.Namespace,
    flags: dict[str, Any],
    sizes: dict[str, Any],
    engine: dict[str, Any],
    budget: dict[str, float],
    out: str | None,
) -> int:
    """A plan whose runs are commands: chosen, run unless --dry-run, and what it predicts. Returns the exit code."""
    progress, width = flags.pop("progress", True), flags.pop("width", None)
    for name in (*flags, *(name for name, value in sizes.items() if value)):
        fix = f"write it into the command, or give --set {name}=... for its {{{name}}}"
        raise ConfigError(f"{flag_of(name)} is for this package's own model; {fix}")
    if set(budget) - {"budget_share"}:
        raise ConfigError("--budget of a command's plan is a share of its target's cost; give 10%")
    size, target = _target(asked.target, width)

    from speedrun_mup.plan.command import choose_command_plan
    from speedrun_mup.sweep import open_engine, write_csv
    from speedrun_mup.transfer import Axes

    share, axes = budget.get("budget_share", 0.1), Axes(size, asked.hyperparameter or "lr")
    plan = choose_command_plan(command, program_of(asked), axes, target, share, asked.smallest or 1)
    folder = Path(out or f"plans/{size}-{target}")
    if asked.dry_run:
        say(*plan.summary().splitlines())
        print("\n".join(line for sweep in plan.sweeps() for line in sweep.commands(folder)))
        return 0
    print(plan.summary())
    with closing(open_engine(**engine, device="auto")) as where:
        result = plan.run(folder, where, progress=progress)
    write_csv(folder, folder / "runs.csv")
    print(result.summary())
    if unfinished := _exit_code(result):
        return unfinished
    prediction = plan.predict(folder)
    print(prediction.summary())
    print(f"next  {plan.target_command(prediction.value)}")
    print(f"      {shlex.join(['speedrun-mup', 'report', str(folder)])}")
    return 0


def _target(text: str | None, width: int | None) -> tuple[str, int]:
    """The size to plan for: its name and value. Raises ConfigError."""
    if (text is None) == (width is None):
        raise ConfigError(
            "say what to plan for: --width 1024, or another size with --target NAME=SIZE, such as n_layer=24"
        )
    if text is None:
        return "width", int(width or 0)
    name, equals, value = text.partition("=")
    try:
        size = whole_number(value.strip())
    except argparse.ArgumentTypeError as fault:
        raise ConfigError(f"--target {printable(text, 60)}: {fault}") from None
    if not equals or not name.strip() or size < 1:
        raise ConfigError(f"--target {printable(text, 60)}: give NAME=SIZE, such as n_layer=24")
    return name.strip(), size


def _train_command(preset: str, flags: dict[str, Any]) -> str:
    """The `speedrun-mup train` with these settings, for a shell."""
    words = ["speedrun-mup", "train", "--preset", preset]
    for name, value in flags.items():
        words += [flag_of(name if value else f"no_{name}")] if isinstance(value, bool) else [flag_of(name), str(value)]
    return shlex.join(words)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """The flags that say what becomes of a plan, and what it is for."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--run",
        nargs="?",
        const=True,
        default=False,
        metavar="COMMAND",
        help="run the planned sweep; rerun the command to resume it. With a COMMAND this is what trains, instead of this "
        "package's model: 'python train.py --n_embd={width} --lr={lr} --seed={seed}', as in speedrun-mup sweep",
    )
    group.add_argument("--out", metavar="DIR", help="folder to keep the plan in (with --run: plans/width-WIDTH)")
    group.add_argument("--preset", choices=tuple(PRESETS), default="laptop", help="preset for all settings not given")
    group.add_argument("--json", action="store_true", help="the plan and the designs considered, as JSON")
    _add_sizes(group)


def _add_sizes(group: Any) -> None:
    """The flags of a plan whose proxies are smaller in several sizes."""
    group.add_argument("--tokens", type=whole_number, metavar="INT", help="of the target run in all, such as 2B")
    group.add_argument("--batch-tokens", type=whole_number, metavar="INT", help="of one of its steps, such as 512k")
    group.add_argument(
        "--axes",
        **several(str),
        default=[],
        metavar="NAME",
        help="sizes in which proxies are smaller than the target: width, n_layer, batch_tokens, tokens; default: width, and "
        "with --tokens or --batch-tokens all sizes that are given",
    )
    group.add_argument(
        "--priors",
        metavar="JSON|published",
        help="exponents measured elsewhere, a file with mean and standard deviation of each: "
        '{"drift": {"tokens": [-0.33, 0.05]}, "loss": {}}; published: those of docs/experiments',
    )


def _axes(flags: dict[str, Any], axes: list[str], tokens: int | None, batch_tokens: int | None) -> list[str]:
    """The sizes of a joint plan; none for one over width alone. Raises ConfigError for what contradicts itself."""
    for flag, given, same in (("--tokens", tokens, "iterations"), ("--batch-tokens", batch_tokens, "micro_batches")):
        if given is not None and same in flags:
            raise ConfigError(f"{flag} and --{same.replace('_', '-')} say the same of the target; give one")
        if given is not None and given < 1:
            raise ConfigError(f"{flag} {given}: give a number above zero")
    named = [name.strip().lower().replace("-", "_") for name in axes]
    if unknown := [name for name in named if name not in SCALED]:
        raise ConfigError(f"--axes {unknown[0]}: choose among {', '.join(SCALED)}")
    if not named and tokens is None and batch_tokens is None:
        return []
    is_given = {"width": True, "n_layer": "n_layer" in flags, "batch_tokens": batch_tokens, "tokens": tokens}
    found = [name for name in SCALED if (name in named if named else is_given[name])]
    return [] if found == ["width"] and tokens is None and batch_tokens is None else found


def _joint(
    argv: Sequence[str],
    target: TrainConfig,
    names: list[str],
    sizes: dict[str, Any],
    engine: dict[str, Any],
    budget: dict[str, float],
    carry_out: bool,
    out: str | None,
) -> int:
    """A plan over several sizes. Returns the exit code."""
    say(rules_in_force(target), f"choosing proxies smaller in {', '.join(names)}")
    from speedrun_mup.plan import predict_joint, run_joint_plan, whole_target
    from speedrun_mup.sweep import open_engine

    target = whole_target(target, sizes["batch_tokens"], sizes["tokens"])
    priors = _read_priors(sizes["priors"], target, names)
    folder, keep = Path(out or f"plans/{'-'.join(names)}-{target.width}"), carry_out or out is not None
    with closing(open_engine(**engine, device=target.device)) as where:
        with _saying_what_is_enough(argv):
            plan = _choose_joint(target, names, _limits(budget), priors, where, folder if keep else None)
        print(plan.summary())
        _say_what_is_next(folder if keep else None, carry_out)
        if not carry_out:
            return 0
        result = run_joint_plan(plan, folder, where, progress=target.progress)
    print(result.summary())
    if unfinished := _exit_code(result):
        return unfinished
    prediction = predict_joint(folder)
    print(prediction.summary())
    print(f"next  train the target with --lr-scale {prediction.lr_scale:.4g}, then")
    print(f"      speedrun-mup report {folder} --target runs/NAME compares prediction and result")
    return 0


def _choose_joint(
    target: TrainConfig, names: list[str], budget: Budget, priors: dict[str, Any], engine: Engine, folder: Path | None
) -> JointPlan:
    """The plan in `folder` if it answers, else a new one, written there; without a folder it is not kept."""
    from speedrun_mup.plan import choose_joint_plan, load_joint_plan, save_joint_plan

    if folder and (found := load_joint_plan(target, names, budget, priors, folder)):
        return found
    plan = choose_joint_plan(target, names, budget, priors, engine, say)
    if folder:
        save_joint_plan(plan, folder, budget)
    return plan


def _read_priors(given: str | None, target: TrainConfig, names: list[str]) -> dict[str, Any]:
    """What --priors means for this target. Raises ConfigError for a file that cannot be read."""
    from speedrun_mup.plan import published_priors

    if given is None:
        return {}
    if given == "published":
        return published_priors(target, names)
    path = Path(given)
    try:
        found = json.loads(read_bytes(path))
    except (OSError, ValueError, RecursionError):
        raise ConfigError(f"--priors {printable(path)}: cannot be read as JSON; see --help for what it holds") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--priors {printable(path)}: give an object, as --help shows it")
    return found


def _limits(budget: dict[str, float]) -> Budget:
    from speedrun_mup.plan import Budget

    return Budget(**{name.removeprefix("budget_"): amount for name, amount in budget.items()})


@contextmanager
def _saying_what_is_enough(argv: Sequence[str]) -> Iterator[None]:
    """Where no plan fits the budget, add the command line with one that is enough."""
    from speedrun_mup.plan import NoPlanFits

    try:
        yield
    except NoPlanFits as fault:
        raise ConfigError(f"{fault}; enough is: {_with_budget(argv, fault.enough)}") from None


def _say_what_is_next(kept_in: Path | None, carry_out: bool) -> None:
    """Where the plan is, if it is kept, and what runs it, if that is not done now."""
    if kept_in:
        say(f"plan  {kept_in / 'plan.json'}")
    if not carry_out:
        say("next  the same command with --run trains the proxies and predicts")


def _exit_code(result: SweepResult) -> int:
    """0 for proxies that are finished, or as far as the budget goes."""
    if result.complete or result.used_up:
        return 0
    return STOPPED_BY_SIGNAL if result.stopped else 1


def say(*lines: str) -> None:
    """What is not the result goes to stderr, at once."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


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
    from speedrun_mup.plan import choose_plan, load_plan, save_plan

    if keep or not budget:
        plan = load_plan(target, folder, budget)
        if plan:
            return plan, []
    limits = _limits(budget)
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
