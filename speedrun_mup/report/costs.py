"""What a sweep cost compared with the run that it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from speedrun_mup.config import TrainConfig
from speedrun_mup.report.contents import GREY, Axis, Figure, Key, Mark, Panel, Section, Table
from speedrun_mup.report.figures import arm_colors, main_arm
from speedrun_mup.report.words import arm_words
from speedrun_mup.sweep import RunResult
from speedrun_mup.training.flops import run_flops
from speedrun_mup.training.tracking import clock
from speedrun_mup.transfer import Axes, TransferResult
from speedrun_mup.transfer.axes import sized

GOAL = 0.1  # a sweep should cost no more of its target than this
REACH = 4  # doublings beyond the widest proxy that the figure shows


def cost_section(result: TransferResult, runs: Sequence[RunResult], target: TrainConfig | None) -> Section:
    """FLOPs of all finished `runs` over those of `target`, and of runs just as long at larger sizes."""
    axes, largest = result.axes, max((run for run in runs if not run.diverged), key=lambda run: run.size)
    like, vocab = target or largest.settings, largest.vocabulary
    everything = _Cost("all runs", list(runs))
    arms = [_Cost(name, [run for run in runs if run.arm == name]) for name in result.arms]
    tuning = next(arm for arm in arms if arm.name == main_arm(result).arm)
    shown = [everything, tuning] if len(arms) > 1 else [everything]
    text = [
        f"The {len(runs)} runs of the sweep took {everything.flops:.3g} FLOPs, and {everything.time} of one worker's "
        "time. Counted are matrix products of training; controls are what trust costs, not what the tuning needs."
    ]
    large = {largest.size * 2**power for power in range(REACH + 1)}
    if target:
        one, aimed = run_flops(target, vocab), axes.scale.of(target)
        told = ", ".join(f"{arm_words(cost.name)} {cost.flops / one:.1%}" for cost in shown)
        text.append(f"The target, {axes.at(aimed)}, takes {one:.3g} FLOPs. The sweep took, as shares of that: {told}.")
        if everything.flops > one:
            text.append(_expensive(everything.flops / one, axes, aimed, largest.size))
        large.add(aimed)
    sizes = sorted(large)
    costs = [run_flops(_sized(like, axes, size), vocab) for size in sizes]
    marks = [Mark("line", sizes, [GOAL] * len(sizes), GREY, dotted=True, size=1)]
    for cost in shown:
        color = arm_colors(result).get(cost.name, GREY)
        tags = {} if cost is everything else {"arm": cost.name}
        shares = [cost.flops / one for one in costs]
        name = arm_words(cost.name)
        marks.append(Mark("line", sizes, shares, color, f"{name}, over one run", tags, size=1.4))
        if target:
            at = sizes.index(aimed)
            style: dict[str, Any] = {"symbol": "D", "size": 6}
            marks.append(Mark("points", [aimed], [shares[at]], color, f"{name}, over the target run", tags, **style))
    keys = [Key("goal: 10 % of the run", "line", dotted=True)]
    keys += [Key(arm_words(cost.name), "line", arm_colors(result).get(cost.name, GREY)) for cost in reversed(shown)]
    caption = (
        f"FLOPs of the sweep over those of one run{' as long' * axes.scale.of_model}, by the {axes.size} of that run: 100 % is "
        f"as much as the run itself. A {axes.scale.larger} run costs more and the sweep does not, so that the share falls."
    )
    if target:
        keys.append(Key("the target", "points", symbol="D"))
    x = Axis(f"{axes.size} of the run that is served", "log2", ticks=sizes)
    y = Axis("cost of the sweep over one run", "log", percent=True)
    figure = Figure("cost", caption, x, y, [Panel("", marks)], keys, size=(4.4, 2.8))
    listed = [*arms, everything] if len(arms) > 1 else [everything]
    rows = [[arm_words(cost.name), str(len(cost.runs)), f"{cost.flops:.3g}", cost.time] for cost in listed]
    return Section("Cost", text, [figure], [Table(["arm", "runs", "FLOPs", "time of one worker"], rows)])


def _sized(cfg: TrainConfig, axes: Axes, size: int) -> TrainConfig:
    return sized(cfg, {axes.size: size})


def _expensive(share: float, axes: Axes, target: int, largest: int) -> str:
    """A sentence for a sweep that cost more than the run that it served."""
    return (
        f"So the tuning took {share:.1f} times as much as the run that it was for. That is the price of a small target: "
        f"{axes.at(target)} is only {target / largest:.3g} times the {axes.scale.largest} of the sweep. For runs of many times "
        f"that {axes.size} the same sweep is a small share, as the figure shows."
    )


@dataclass(frozen=True)
class _Cost:
    """What some runs cost together."""

    name: str
    runs: list[RunResult]

    @property
    def flops(self) -> float:
        """Of training, all runs."""
        return sum(run.flops for run in self.runs)

    @property
    def time(self) -> str:
        """Of one worker, for a reader."""
        return clock(sum(run.seconds for run in self.runs))
