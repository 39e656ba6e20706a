"""What a sweep cost beside the run that it serves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speedrun_mup.config import TrainConfig, from_json
from speedrun_mup.core.model import VOCAB_MULTIPLE
from speedrun_mup.report.contents import GREY, Axis, Figure, Key, Mark, Panel, Section, Table
from speedrun_mup.report.figures import arm_colors, main_arm
from speedrun_mup.report.words import arm_words
from speedrun_mup.sweep import CELLS, RESULT, CellResult
from speedrun_mup.training.flops import flops_per_token, run_flops
from speedrun_mup.training.tracking import clock
from speedrun_mup.transfer import TransferResult

GOAL = 0.1  # a sweep should cost no more of its target than this
REACH = 4  # doublings beyond the widest proxy that the figure shows


def cost_section(
    result: TransferResult, cells: Sequence[CellResult], folder: Path, target: TrainConfig | None
) -> Section:
    """FLOPs of all finished `cells` over those of `target`, and of runs just as long at larger widths."""
    widest = max((cell for cell in cells if not cell.diverged), key=lambda cell: cell.width)
    source = folder / CELLS / widest.id / RESULT
    like = target or from_json(json.dumps(widest.config), source)
    vocab = vocabulary(widest, source)
    everything = _Cost("all runs", list(cells))
    arms = [_Cost(name, [cell for cell in cells if cell.arm == name]) for name in result.arms]
    tuning = next(arm for arm in arms if arm.name == main_arm(result).arm)
    shown = [everything, tuning] if len(arms) > 1 else [everything]
    text = [
        f"The {len(cells)} runs of the sweep took {everything.flops:.3g} FLOPs, and {everything.time} of one worker's "
        "time. Counted are matrix products of training; controls are what trust costs, not what the tuning needs."
    ]
    wide = {widest.width * 2**power for power in range(REACH + 1)}
    if target:
        one = run_flops(target, vocab)
        told = ", ".join(f"{arm_words(cost.name)} {cost.flops / one:.1%}" for cost in shown)
        text.append(
            f"The target, width {target.width}, takes {one:.3g} FLOPs. The sweep took, as shares of that: {told}."
        )
        if everything.flops > one:
            text.append(_dear(everything.flops / one, target.width, widest.width))
        wide.add(target.width)
    widths = sorted(wide)
    runs = [run_flops(replace(like, width=width), vocab) for width in widths]
    marks = [Mark("line", widths, [GOAL] * len(widths), GREY, dotted=True, size=1)]
    for cost in shown:
        color = arm_colors(result).get(cost.name, GREY)
        tags = {} if cost is everything else {"arm": cost.name}
        shares = [cost.flops / run for run in runs]
        name = arm_words(cost.name)
        marks.append(Mark("line", widths, shares, color, f"{name}, over one run", tags, size=1.4))
        if target:
            at = widths.index(target.width)
            style: dict[str, Any] = {"symbol": "D", "size": 6}
            marks.append(
                Mark("points", [target.width], [shares[at]], color, f"{name}, over the target run", tags, **style)
            )
    keys = [Key("goal: 10 % of the run", "line", dotted=True)]
    keys += [Key(arm_words(cost.name), "line", arm_colors(result).get(cost.name, GREY)) for cost in reversed(shown)]
    caption = (
        "FLOPs of the sweep over those of one run as long, by the width of that run: 100 % is as much as the run itself. A "
        "wider run costs more and the sweep does not, so that the share falls."
    )
    if target:
        keys.append(Key("the target", "points", symbol="D"))
    x = Axis("width of the run that is served", "log2", ticks=widths)
    y = Axis("cost of the sweep over one run", "log", percent=True)
    figure = Figure("cost", caption, x, y, [Panel("", marks)], keys, size=(4.4, 2.8))
    listed = [*arms, everything] if len(arms) > 1 else [everything]
    rows = [[arm_words(cost.name), str(len(cost.cells)), f"{cost.flops:.3g}", cost.time] for cost in listed]
    return Section("Cost", text, [figure], [Table(["arm", "runs", "FLOPs", "time of one worker"], rows)])


def _dear(share: float, target: int, widest: int) -> str:
    """A sentence for a sweep that cost more than the run that it served."""
    return (
        f"So the tuning took {share:.1f} times as much as the run that it was for. That is the price of a small target: width "
        f"{target} is only {target / widest:.3g} times the widest model of the sweep. For runs of many times that width the "
        "same sweep is a small share, as the figure shows."
    )


@dataclass(frozen=True)
class _Cost:
    """What some cells cost together."""

    name: str
    cells: list[CellResult]

    @property
    def flops(self) -> float:
        """Of training, all cells."""
        return sum(cell.flops for cell in self.cells)

    @property
    def time(self) -> str:
        """Of one worker, for a reader."""
        return clock(sum(cell.seconds for cell in self.cells))


def vocabulary(cell: CellResult, source: Path) -> int:
    """The padded vocabulary of a finished cell's data, which is not recorded but counts in its FLOPs."""
    cfg = from_json(json.dumps(cell.config), source)
    per_token = cell.flops / cfg.schedule.tokens_before(len(cell.curve))
    return VOCAB_MULTIPLE + round((per_token - flops_per_token(cfg, VOCAB_MULTIPLE)) / (6 * cfg.width))
