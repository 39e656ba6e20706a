"""What a report says of runs that another program made: its commands, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from speedrun_mup.files import printable
from speedrun_mup.report.contents import Section, Table
from speedrun_mup.report.words import arm_words
from speedrun_mup.sweep import RunResult, read_definition
from speedrun_mup.training.tracking import clock
from speedrun_mup.transfer import TransferResult


def facts_of_programs(source: Path, runs: Sequence[RunResult]) -> Iterator[tuple[str, str]]:
    """What was run, where its loss was read, and how often; name and value. source: the sweep's folder."""
    definition = read_definition(source)
    for name, arm in definition["arms"].items():
        if command := arm["settings"].get("command"):
            yield f"Command of {printable(name, 60)}", f"`{printable(command, 500)}`"
    base = definition["base"]
    if "metric" in base:
        where = f" in `{printable(base['metric_file'])}`" if "metric_file" in base else ""
        yield "Loss", f"the last `{printable(base['metric'])}`{where}"
    if held := [f"{name} = {text}" for name, text in base.get("set", {}).items()]:
        yield "Values", printable(", ".join(held), 500)
    bad, seeds = sum(run.diverged for run in runs), len({run.seed for run in runs})
    yield "Runs", f"{len(runs)}, with {seeds} seeds or fewer; {bad} diverged"


def cost_of_programs(result: TransferResult, runs: Sequence[RunResult]) -> Section:
    """What the runs took together and for each arm: time, and FLOPs where a formula says them."""
    rows = []
    groups = {arm_words(name): [run for run in runs if run.arm == name] for name in result.arms}
    for name, some in (groups | ({"all runs": list(runs)} if len(groups) > 1 else {})).items():
        flops = sum(run.flops for run in some)
        rows.append([name, str(len(some)), f"{flops:.3g}" if flops else "not known", _time(some)])
    text = f"The {len(runs)} runs took {_time(runs)} of one worker's time."
    return Section("Cost", [text], [], [Table(["arm", "runs", "FLOPs", "time of one worker"], rows)])


def _time(runs: Sequence[RunResult]) -> str:
    return clock(sum(run.seconds for run in runs))
