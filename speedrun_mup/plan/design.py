"""The sweep that finds a target's learning rate most exactly within a budget."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.data.shards import Corpus
from speedrun_mup.sweep import (
    Arm,
    CostModel,
    Engine,
    Failure,
    Sweep,
    arm_name,
    read_results,
)
from speedrun_mup.training.flops import run_flops
from speedrun_mup.training.tracking import clock
from speedrun_mup.transfer import Thresholds

# log2 factors to run, and those that the sweep usually adds: half steps if it is refined, else one on the better side.
# The lean grid is for small budgets: cheap if the optimum is less than a factor of 2 from what was tuned at base width, else
# extended like any other.
FULL = ((-2.0, -1.0, 0.0, 1.0, 2.0), (-1.5, -0.5, 0.5, 1.5))
LEAN = ((-1.0, 0.0, 1.0), (2.0,))
SEEDS, MOST_SEEDS = (1, 2, 3, 5), 5  # of the widest proxy; every narrower one has twice as many, up to the most
PROBE_STEPS, PROBE_S = 3, 60.0  # steps to time at each width, unless they would take longer than this
PROBE_VAL_TOKENS = 8192  # to validate on then; the rest of a validation is reckoned from the speed of training
MORE_SHOWN = 4  # designs that cost more than the one chosen
FORWARD_SHARE = 1 / 3  # of a training step's FLOPs
# Standard deviation of one run's loss over the curvature of loss in log2 lr; 0.005 nats over 0.02 nats is usual for small
# language models. It only serves to say in advance what a plan will achieve.
NOISE_OVER_CURVATURE = 0.25


@dataclass(frozen=True)
class Plan:
    """The sweep that finds the learning rate of `target` most exactly within the budget.

    seeds: per width. log2_factors: the grid. refine: add half steps around the minimum. runs: with what that usually adds.
    flops: of the sweep; target_flops: of the target run. sweep_s, target_s: on this machine with `workers` workers.
    lr_error: expected standard error of the target's best learning rate, log2.
    """

    target: TrainConfig
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    log2_factors: tuple[float, ...]
    refine: bool
    runs: int
    flops: float
    target_flops: float
    workers: int
    sweep_s: float
    target_s: float
    lr_error: float

    @property
    def points(self) -> int:
        """Learning rates at each width, those included that the sweep usually adds."""
        return self.runs // sum(self.seeds)

    @property
    def sweeps(self) -> tuple[Sweep, ...]:
        """What to run, all in one folder: one sweep per number of seeds."""
        base = proxy_base(self.target)
        alike = itertools.groupby(zip(self.widths, self.seeds, strict=True), key=lambda pair: pair[1])
        return tuple(
            Sweep(
                base,
                tuple(width for width, _ in pairs),
                (arm_of(self.target),),
                self.log2_factors,
                tuple(range(seeds)),
                refine=self.refine,
            )
            for seeds, pairs in alike
        )

    def summary(self) -> str:
        """For a terminal."""
        target = self.target
        dear = " (for a target this small tuning costs more than training it; the share falls with the target's size)"
        dear = dear if self.flops > self.target_flops else ""
        lines = [
            f"target: width {target.width}, {target.schedule.describe()}; "
            f"{self.target_flops:.3g} FLOPs, about {clock(self.target_s)} here",
            f"proxies: widths (seeds) {self.proxies}, about {self.points} learning rates each: about {self.runs} runs",
            f"cost: {self.flops:.3g} FLOPs, {self.flops / self.target_flops:.1%} of the target run{dear}; "
            f"about {clock(self.sweep_s)} with {self.workers} workers",
            f"the learning rate will be known within a factor of about {2**self.lr_error:.2f} (standard error)",
        ]
        if self.is_short:
            lines.append(
                f"a short ladder: no other fits the budget. {self.widths[0]} to {self.widths[-1]} is less than a factor of "
                f"{Thresholds.min_span:g}, so the verdict on transfer will be INCONCLUSIVE and the forecast of the loss rough"
            )
        return "\n".join(lines)

    @property
    def proxies(self) -> str:
        """Widths, each with its number of seeds."""
        return ", ".join(f"{width} ({seeds})" for width, seeds in zip(self.widths, self.seeds, strict=True))

    @property
    def is_short(self) -> bool:
        """Whether the widths span too little for a verdict on transfer."""
        return self.widths[-1] < Thresholds.min_span * self.widths[0]


def proxy_base(target: TrainConfig) -> TrainConfig:
    """The target's settings as the base of a sweep; without a base width, its rates are meant for its own width."""
    return replace(target, base_width=target.tuned_width)


def arm_of(target: TrainConfig) -> Arm:
    """The target's own optimizer and rule table. Without a base width, or with the record's rules at their own width, all
    tables are one, and muP is what carries over."""
    own = target.base_width is None or (target.parametrization == "record26" and target.base_width == target.width)
    table = "mup" if own else target.parametrization
    hidden = target.groups["matrix"].optimizer
    return Arm(arm_name(hidden, table), {"parametrization": table, "matrix_optimizer": hidden})


class NoPlanFits(ConfigError):
    """The budget is too small for any design. enough: the --budget that the cheapest one needs."""

    def __init__(self, text: str, enough: str):
        super().__init__(text)
        self.enough = enough


Tell = Callable[[str], None]


class Priced(Protocol):
    """A plan, as a budget looks at it."""

    @property
    def flops(self) -> float:
        """Of its runs."""

    @property
    def target_flops(self) -> float:
        """Of the target run."""

    @property
    def sweep_s(self) -> float:
        """Seconds of its runs here; 0 if unknown."""


@dataclass(frozen=True)
class Budget:
    """What a plan may cost. share: of the target run's FLOPs. The tightest one counts."""

    minutes: float | None = None
    flops: float | None = None
    share: float | None = None

    def most_flops(self, target_flops: float) -> float:
        """FLOPs that may be used."""
        return min(self.flops or math.inf, (self.share or math.inf) * target_flops)

    @property
    def most_s(self) -> float:
        """Seconds that may be used."""
        return 60 * (self.minutes or math.inf)

    def enough_for(self, plan: Priced) -> str:
        """A value of --budget that `plan` fits into, in the unit of this budget."""
        if self.minutes is not None and plan.sweep_s > self.most_s:
            return f"{math.ceil(1.1 * plan.sweep_s / 60)}m"  # the next timing differs a little
        if self.share is not None:
            return f"{math.ceil(1000 * plan.flops / plan.target_flops) / 10:g}%"
        return f"{1.01 * plan.flops:.3g}"

    def holds(self, plan: Priced) -> bool:
        """Whether `plan` fits into it."""
        return plan.flops <= self.most_flops(plan.target_flops) and plan.sweep_s <= self.most_s


def choose_plan(
    target: TrainConfig, out: Path, engine: Engine, budget: Budget, tell: Tell = lambda line: None
) -> tuple[Plan, list[Plan]]:
    """The sweep that finds the target's learning rate most exactly within the budget, and what else there is for its price.

    Considered are head_dim times powers of two below the target's width, at least as many neighbouring ones as a
    verdict needs, with few seeds or many; chosen is what fits the budget with the smallest expected error of the
    learning rate extrapolated to the target's width. If none fits, ladders too short for a verdict are considered. Times
    come from finished runs in `out`, else from a few steps per width, and where the budget is FLOPs only of the widths
    that were chosen.

    Args:
        out: Folder of the sweep; only finished runs are read.
        tell: Receives what is being timed, line by line.

    Returns:
        The plan, and the designs of which none is both cheaper and more exact than another, cheapest first.

    Raises:
        NoPlanFits: No design fits; it says what the smallest costs.
        ConfigError: No budget, or a target without room for proxies.
    """
    if budget == Budget():
        raise ConfigError(
            "a plan needs a budget; give --budget, for instance 30m, 1e18 FLOPs, or 10% of the target run"
        )
    corpus, _ = find_corpus(target.data, target.tokenizer)
    candidates, costs = _proxy_widths(target), CostModel(read_results(out))

    def designs() -> list[Plan]:
        whole = [(*choice, grid) for choice in ladders(candidates) for grid in (FULL, LEAN)]
        short = [(*choice, LEAN) for choice in _short_ladders(target)]
        return [_design(target, *choice, engine.workers, costs, corpus) for choice in (*whole, *short)]

    def best() -> Plan | None:
        fitting = [plan for plan in designs() if budget.holds(plan)]
        return min(fitting, key=lambda plan: (plan.is_short, plan.lr_error, plan.flops), default=None)

    most_flops = budget.most_flops(run_flops(target, corpus.vocab_size))
    plan = best()  # where nothing is known of time, it costs none
    if plan and not costs.known:
        probe(target, candidates if budget.minutes else plan.widths, engine, corpus, costs, tell)
        plan = best()
    every = designs()
    if not plan:
        in_flops = [plan for plan in every if plan.flops <= most_flops]
        least = min(in_flops, key=lambda plan: plan.sweep_s) if in_flops else min(every, key=lambda plan: plan.flops)
        raise NoPlanFits(f"no plan fits the budget: the smallest takes {_cost(least)}", budget.enough_for(least))
    return plan, _worth_their_price(every)


def _cost(plan: Plan) -> str:
    time = f" and {plan.sweep_s / 60:.1f} minutes here" if plan.sweep_s else ""
    return f"{plan.flops:.3g} FLOPs ({plan.flops / plan.target_flops:.1%} of the target run){time}"


def design_table(plans: Iterable[Plan], chosen: Plan) -> str:
    """For a terminal, a line each: `chosen`, marked, the designs that cost less, and the next few that cost more."""
    by_cost = sorted({_shape(plan): plan for plan in (*plans, chosen)}.values(), key=lambda plan: plan.flops)
    dearer = [plan for plan in by_cost if plan.flops > chosen.flops]
    plans = [plan for plan in by_cost if plan.flops <= chosen.flops] + dearer[:MORE_SHOWN]
    rows = [("", "widths (seeds)", "rates", "runs", "of the target", "time here", "rate known within a factor of")]
    for plan in plans:
        mark, share = "*" if _shape(plan) == _shape(chosen) else "", f"{plan.flops / plan.target_flops:.1%}"
        short = ", no verdict" if plan.is_short else ""
        cost = (str(plan.points), str(plan.runs), share, clock(plan.sweep_s))
        rows.append((mark, plan.proxies, *cost, f"{2**plan.lr_error:.2f}{short}"))
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(size) for cell, size in zip(row, wide, strict=True)).rstrip() for row in rows)


def _shape(plan: Plan) -> tuple[object, ...]:
    return plan.widths, plan.seeds, plan.log2_factors


def _worth_their_price(plans: Iterable[Plan]) -> list[Plan]:
    """Those that no cheaper one equals within a tenth of its error, cheapest first."""
    kept: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.flops, plan.lr_error)):
        if not kept or plan.lr_error < 0.9 * kept[-1].lr_error:
            kept.append(plan)
    return kept


def _proxy_widths(target: TrainConfig) -> list[int]:
    """Proxy widths to choose from, ascending."""
    powers = (target.head_dim * 2**power for power in itertools.count())
    widths = list(itertools.takewhile(lambda width: width < target.width, powers))
    if len(widths) < Thresholds.min_sizes:
        least = target.head_dim * 2**Thresholds.min_sizes
        raise ConfigError(
            f"width={target.width} leaves no room for {Thresholds.min_sizes} proxy widths from head_dim="
            f"{target.head_dim} up, each twice the one before; plan for a width of {least} or more, or with a smaller --head-dim"
        )
    return widths


def ladders(candidates: list[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Neighbouring widths, at least as many as a verdict needs, and their numbers of seeds."""
    for first, last in itertools.combinations(range(len(candidates) + 1), 2):
        count = last - first
        if count >= Thresholds.min_sizes:
            for widest in SEEDS:
                seeds = tuple(min(MOST_SEEDS, widest * 2**narrower) for narrower in reversed(range(count)))
                yield tuple(candidates[first:last]), seeds
            yield tuple(candidates[first:last]), (2,) + (1,) * (count - 1)  # the cheapest that shows its noise


def _short_ladders(target: TrainConfig) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cheaper than any of `ladders`: widths of one, two and three heads, which span too little for a verdict."""
    widths = tuple(target.head_dim * count for count in (1, 2, 3))
    if widths[-1] < target.width:
        yield widths, (4, 2, 1)
        yield widths, (2, 1, 1)


def _design(
    target: TrainConfig,
    widths: tuple[int, ...],
    seeds: tuple[int, ...],
    grid: tuple[tuple[float, ...], tuple[float, ...]],
    workers: int,
    costs: CostModel,
    corpus: Corpus,
) -> Plan:
    """What one choice costs and how well it will do."""
    factors, added = grid
    runs = [count * (len(factors) + len(added)) for count in seeds]
    flops = [run_flops(replace(target, width=width), corpus.vocab_size) for width in widths]
    seconds = [costs.seconds(width, cost) for width, cost in zip(widths, flops, strict=True)]
    whole = run_flops(target, corpus.vocab_size)
    return Plan(
        target=target,
        widths=widths,
        seeds=seeds,
        log2_factors=factors,
        refine=factors == FULL[0],
        runs=sum(runs),
        flops=sum(count * cost for count, cost in zip(runs, flops, strict=True)),
        target_flops=whole,
        workers=workers,
        sweep_s=max(sum(count * each for count, each in zip(runs, seconds, strict=True)) / workers, *seconds),
        target_s=whole / (workers * costs.flops_per_s(widths[-1])) if costs.known else 0.0,
        lr_error=expected_lr_error(widths, seeds, factors + added, target.width),
    )


def expected_lr_error(widths: Sequence[int], seeds: Sequence[int], log2_factors: Sequence[float], target: int) -> float:
    """Standard error, in log2, of a weighted line through the optima of `widths`, followed to the width `target`.

    One optimum is the vertex -b / 2c of a quadratic fit to points u about their middle; b has variance
    noise**2 / sum(u**2) / seeds. Simulated sweeps did up to 1.4 times worse.
    """
    middle = sum(log2_factors) / len(log2_factors)
    squares = sum((u - middle) ** 2 for u in log2_factors)
    weights = [4 * squares * count / NOISE_OVER_CURVATURE**2 for count in seeds]
    doublings = [math.log2(width / target) for width in widths]
    mean = sum(w * at for w, at in zip(weights, doublings, strict=True)) / sum(weights)
    spread = sum(w * (at - mean) ** 2 for w, at in zip(weights, doublings, strict=True))
    return math.sqrt(1 / sum(weights) + mean**2 / spread)


def probe(
    target: TrainConfig, widths: Sequence[int], engine: Engine, corpus: Corpus, costs: CostModel, tell: Tell
) -> None:
    """Teach `costs` how long runs take: a few steps per width, on all workers at once, as a sweep would run them.

    Args:
        target: Settings of the run that is planned for.
        widths: Ascending; those whose probe would take longer than PROBE_S are left out.
        engine: Where runs will take place.
        corpus: Of the target.
        costs: Is taught.
        tell: Receives what is being timed, line by line.

    Raises:
        ConfigError: A run failed.
    """
    base, arm = proxy_base(target), arm_of(target)
    chunk = target.val_chunk_tokens
    val_tokens = min(target.val_tokens, max(chunk, PROBE_VAL_TOKENS // chunk * chunk))
    base = replace(base, iterations=PROBE_STEPS, batch_schedule="constant", val_tokens=val_tokens)
    base = replace(base, kernel_warmup=max(target.kernel_warmup, 1))
    left_out = (target.val_tokens - val_tokens) / base.schedule.tokens * FORWARD_SHARE
    with tempfile.TemporaryDirectory() as scratch:
        for width in widths:
            sweep = Sweep(base, (width,), (arm,))
            specs = [sweep.run_spec(arm, width, 0.0, seed, corpus) for seed in range(engine.workers)]
            if costs.seconds(width, specs[0].flops) > PROBE_S:
                break
            tell(f"timing: {PROBE_STEPS} steps of width {width}, {engine.workers} at a time")
            for turn in ("cold", "warm")[width != widths[0] :]:  # a worker's first run imports what it needs
                for spec, outcome in engine.run(iter(specs), Path(scratch)):
                    if isinstance(outcome, Failure):
                        raise ConfigError(f"timing {spec} failed: {outcome.why}; fix that first")
                    if turn == "warm":
                        costs.learn(replace(outcome, seconds=outcome.seconds + left_out * outcome.train_s))
