"""From the runs of an ablation to what each technique is worth: in loss, steps, seconds and FLOPs, at every width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speedrun_mup.ablate.design import PLACEBO, Comparison, Design
from speedrun_mup.ablate.statistics import (
    Array,
    Estimated,
    Finding,
    Verdict,
    at_best_rates,
    best_rates,
    gain_of,
    judge,
    noise_of,
    steps_to,
)
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.sweep import RunResult

TAIL = 0.1  # of the steps, over which a training loss is averaged


@dataclass(frozen=True)
class Costs:
    """How many times cheaper the loss of the arm without it is reached with it, mean over seeds; nan where it never is.

    The training loss decides, so that a run that ends with a falling learning rate counts as having that loss at its end.
    """

    steps: float
    seconds: float
    flops: float


@dataclass(frozen=True)
class Ablation:
    """What an ablation found.

    Args:
        widths: In order.
        seeds: Of every arm.
        noise: Standard deviation of a run's loss at each width, beyond its arm and its seed.
        rates: Arm -> log2 of the factor on the learning rate that is best at each width; None where all runs diverged.
        findings: One for each comparison, the placebo last; costs: of the same, by width.
        at_edge: Arms and widths whose best rate is the first or the last of its grid.
    """

    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    noise: tuple[float, ...]
    rates: dict[str, tuple[float | None, ...]]
    findings: tuple[Finding, ...]
    costs: tuple[tuple[Costs, ...], ...]
    at_edge: tuple[tuple[str, int], ...]

    @property
    def placebo_holds(self) -> bool:
        """Whether a change that does nothing came out as nothing."""
        return all(each.verdict is Verdict.INCONCLUSIVE for each in self.findings if each.name == PLACEBO)


def measure(results: Sequence[RunResult], design: Design, widths: Sequence[int], seeds: Sequence[int]) -> Ablation:
    """The findings of `results`. Raises ConfigError if an arm has no run at a width."""
    names = [arm.name for arm in design.arms]
    places = sorted({result.log2_factor for result in results})
    by_place = {(r.arm, r.size, r.log2_factor, r.seed): r for r in results}
    losses = np.full((len(names), len(widths), len(places), len(seeds)), math.nan)
    axes: list[Sequence[Any]] = [names, widths, places, seeds]
    for index in np.ndindex(*losses.shape):
        arm, width, at, seed = (values[i] for values, i in zip(axes, index))
        run = by_place.get((arm, width, at, seed))
        losses[index] = math.nan if run is None or run.diverged else run.loss
    for arm, width in ((arm, width) for arm in names for width in widths):
        if not any((arm, width, at, seed) in by_place for at in places for seed in seeds):
            raise ConfigError(f"arm {arm} has no run at width {width}; rerun the command to finish the ablation")
    best, chosen = best_rates(losses), at_best_rates(losses)
    noise = [noise_of(chosen[:, w]) for w in range(len(widths))]
    at_best = {
        (arm, width): [by_place[arm, width, places[best[a, w]], seed] for seed in seeds]
        for a, arm in enumerate(names)
        for w, width in enumerate(widths)
        if best[a, w] >= 0
    }
    gains = [_gains(chosen, names, one, noise) for one in design.comparisons]
    edge = [
        (arm, width)
        for a, arm in enumerate(names)
        for w, width in enumerate(widths)
        if best[a, w] in _ends(by_place, arm, width, places)
    ]
    return Ablation(
        tuple(widths),
        tuple(seeds),
        tuple(math.sqrt(variance) for variance, _ in noise),
        {arm: tuple(places[i] if i >= 0 else None for i in best[a]) for a, arm in enumerate(names)},
        tuple(judge([one.name for one in design.comparisons], gains, widths)),
        tuple(tuple(_costs(one, width, at_best) for width in widths) for one in design.comparisons),
        tuple(edge),
    )


def _gains(
    chosen: Array, names: Sequence[str], one: Comparison, noise: Sequence[tuple[float, float]]
) -> list[Estimated]:
    with_it, without = chosen[names.index(one.with_it)], chosen[names.index(one.without)]
    return [gain_of(*of_width) for of_width in zip(with_it, without, noise, strict=True)]


def _ends(by_place: dict[Any, RunResult], arm: str, width: int, places: Sequence[float]) -> set[int]:
    """The first and the last index into `places` of the rates that an arm was trained at."""
    own = [i for i, at in enumerate(places) if any(key[:3] == (arm, width, at) for key in by_place)]
    return {own[0], own[-1]} if len(own) > 1 else set()


def _costs(one: Comparison, width: int, at_best: dict[tuple[str, int], list[RunResult]]) -> Costs:
    with_it, without = at_best.get((one.with_it, width)), at_best.get((one.without, width))
    if not with_it or not without:
        return Costs(math.nan, math.nan, math.nan)
    ratios = [_ratios(*pair) for pair in zip(with_it, without, strict=True)]
    return Costs(*(float(value) for value in np.mean(ratios, axis=0)))


def _ratios(with_it: RunResult, without: RunResult) -> tuple[float, float, float]:
    """Steps, seconds and FLOPs of a whole run without it over those until its loss is reached with it, one seed."""
    over = max(1, round(TAIL * len(without.curve)))
    target = float(np.mean(without.curve[-over:]))
    share = steps_to(with_it.curve, target, over) / len(with_it.curve)  # of the run with it
    return (
        len(without.curve) / (share * len(with_it.curve)),
        without.train_s / (share * with_it.train_s) if with_it.train_s else math.nan,
        without.flops / (share * with_it.flops),
    )


def summary(found: Ablation) -> str:
    """The findings for a terminal."""
    wide = max(len(each.name) for each in found.findings) + 2
    noise = ", ".join(f"{sd:.4f} at {width}" for sd, width in zip(found.noise, found.widths))
    lines = [
        f"noise of a run, beyond its arm and seed: {noise} nats",
        "gain in nats, with an interval for all of them together (95 %), and p of no effect, adjusted for all:",
        "".ljust(wide) + "".join(f"{f'width {width}':>20}" for width in found.widths) + f"{'p':>9}  verdict",
    ]
    for each in found.findings:
        cells = (f"{gain.value:+.4f} +- {reach:.4f}" for gain, reach in zip(each.gains, each.reach))
        lines.append(
            each.name.ljust(wide) + "".join(f"{cell:>20}" for cell in cells) + f"{each.p:>9.2g}  {each.verdict.value}"
        )
    lines.append("how many times fewer steps, seconds, FLOPs to the loss without it (- where it is not reached):")
    for each, costs in zip(found.findings, found.costs):
        cells = (" ".join(_times(value) for value in (cost.steps, cost.seconds, cost.flops)) for cost in costs)
        lines.append(each.name.ljust(wide) + "".join(f"{cell:>20}" for cell in cells))
    lines += [f"best rate at the edge of its grid: {arm} at width {width}" for arm, width in found.at_edge]
    if not found.placebo_holds:
        lines.append("warning: the placebo, which does nothing, has a verdict: do not believe these; give more --seeds")
    return "\n".join(lines)


def _times(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def to_json(found: Ablation) -> dict[str, Any]:
    """All numbers, for ablation.json."""
    return {
        "widths": found.widths,
        "seeds": found.seeds,
        "noise": found.noise,
        "log2_best_rates": found.rates,
        "at_edge": found.at_edge,
        "placebo_holds": found.placebo_holds,
        "findings": [
            {
                "name": each.name,
                "verdict": each.verdict.value,
                "p": each.p,
                "mean": each.mean._asdict(),
                "slope": each.slope._asdict(),
                "widths": [
                    {"width": width, **gain._asdict(), "reach": reach, **vars(cost)}
                    for width, gain, reach, cost in zip(found.widths, each.gains, each.reach, costs)
                ],
            }
            for each, costs in zip(found.findings, found.costs)
        ],
    }
