"""Which small runs a big one needs, what they cost, what learning rate and loss they promise, and by how much they miss.

    plan = make_plan(target, out, engine, budget_minutes=30)    # widths, seeds, cost; writes plan.json
    run_plan(plan, out, engine)
    print(predict(out).summary())                               # learning rate and loss, with intervals
    print(compare(out, run_folder).summary())                   # predicted against measured

The proxies train for as many steps on as many tokens as the target: it is width that learning rates transfer over.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from speedrun_mup.config import TrainConfig, from_json
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.data.shards import Corpus
from speedrun_mup.files import printable, read_bytes, write_whole
from speedrun_mup.sweep import (
    Arm,
    Engine,
    Failure,
    Pace,
    Sweep,
    SweepResult,
    computed_settings,
    measure_sweep,
    read_results,
    run_sweep,
)
from speedrun_mup.training.flops import run_flops
from speedrun_mup.training.run_folder import saved_config
from speedrun_mup.training.tracking import clock, read_metrics
from speedrun_mup.transfer import ArmResult, Forecast, Thresholds, TransferError, loss_forecast

PLAN, VERSION = "plan.json", 1
# Octaves to run, and those that the sweep usually adds to them: half octaves if it is refined, else one on the better side.
# The lean grid is for small budgets: cheap if the optimum is less than an octave from what was tuned at base width, else
# extended like any other.
FULL = ((-2.0, -1.0, 0.0, 1.0, 2.0), (-1.5, -0.5, 0.5, 1.5))
LEAN = ((-1.0, 0.0, 1.0), (2.0,))
SEEDS, MOST_SEEDS = (1, 2, 3, 5), 5  # of the widest proxy; every narrower one has twice as many, up to the most
PROBE_STEPS, PROBE_S = 3, 60.0  # steps to time at each width, unless they would take longer than this
PROBE_VAL_TOKENS = 8192  # to validate on then; the rest of a validation is reckoned from the speed of training
MORE_SHOWN = 4  # designs that cost more than the one chosen
FORWARD_SHARE = 1 / 3  # of a training step's FLOPs
# Standard deviation of one run's loss over the curvature of loss in log2 lr, octaves squared; 0.005 nats over 0.02 nats
# per octave squared is usual for small language models. It only serves to say in advance what a plan will achieve.
NOISE_OVER_CURVATURE = 0.25
LAW_WIDTHS, FEW_SEEDS = 4, 3  # widths that tell the law of the loss; fewer seeds leave the noise uncertain
WIDE = 20  # standard deviations of one run; an interval of the loss wider than this is explained


@dataclass(frozen=True)
class Plan:
    """The sweep that finds the learning rate of `target` most exactly within the budget.

    seeds: per width. octaves: the grid. refine: add half octaves around the minimum. runs: with what that usually adds.
    flops: of the sweep; target_flops: of the target run. sweep_s, target_s: on this machine with `workers` workers.
    lr_error: expected standard error of the target's best learning rate, octaves.
    """

    target: TrainConfig
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    octaves: tuple[float, ...]
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
        base = _proxy_base(self.target)
        alike = itertools.groupby(zip(self.widths, self.seeds, strict=True), key=lambda pair: pair[1])
        return tuple(
            Sweep(
                base,
                tuple(width for width, _ in pairs),
                (_arm(self.target),),
                self.octaves,
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
            f"target: width {target.width}, {target.iterations:,} steps of {target.batch_tokens:,} tokens; "
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


def _proxy_base(target: TrainConfig) -> TrainConfig:
    """The target's settings as the base of a sweep; without a base width, its rates are meant for its own width."""
    return replace(target, base_width=target.base_width or target.width)


def _arm(target: TrainConfig) -> Arm:
    """The target's own optimizer and rule table. Without a base width, or with the record's rules at their own width, all
    tables are one, and muP is what carries over."""
    own = target.base_width is None or (target.parametrization == "record26" and target.base_width == target.width)
    table = "mup" if own else target.parametrization
    name = table if target.hidden_optimizer == "muon" else f"{target.hidden_optimizer}-{table}"
    return Arm(name, {"parametrization": table, "hidden_optimizer": target.hidden_optimizer})


class NoPlanFits(ConfigError):
    """The budget is too small for any design. enough: the --budget that the cheapest one needs."""

    def __init__(self, text: str, enough: str):
        super().__init__(text)
        self.enough = enough


Tell = Callable[[str], None]


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

    def enough_for(self, plan: Plan) -> str:
        """A value of --budget that `plan` fits into, in the unit of this budget."""
        if self.minutes is not None and plan.sweep_s > self.most_s:
            return f"{math.ceil(1.1 * plan.sweep_s / 60)}m"  # the next timing differs a little
        if self.share is not None:
            return f"{math.ceil(1000 * plan.flops / plan.target_flops) / 10:g}%"
        return f"{1.01 * plan.flops:.3g}"


def make_plan(
    target: TrainConfig,
    out: Path,
    engine: Engine,
    *,
    budget_minutes: float | None = None,
    budget_flops: float | None = None,
    budget_share: float | None = None,
    tell: Tell = lambda line: None,
) -> Plan:
    """Choose the sweep for `target` and write it to plan.json in `out`, the folder of the sweep. See `choose_plan`."""
    budget = Budget(budget_minutes, budget_flops, budget_share)
    plan, _ = choose_plan(target, out, engine, budget, tell)
    save_plan(plan, out, budget)
    return plan


def save_plan(plan: Plan, out: Path, budget: Budget) -> None:
    """Write plan.json in the folder `out`, for `planned` and `run_plan`."""
    corpus, _ = find_corpus(plan.target.data, plan.target.tokenizer)
    asked = {f"budget_{name}": value for name, value in asdict(budget).items() if value is not None}
    content = asdict(plan) | {"version": VERSION, "corpus": corpus.fingerprint, "budget": asked, "prediction": None}
    write_whole(out / PLAN, json.dumps(content, indent=1, allow_nan=False) + "\n")


def choose_plan(
    target: TrainConfig, out: Path, engine: Engine, budget: Budget, tell: Tell = lambda line: None
) -> tuple[Plan, list[Plan]]:
    """The sweep that finds the target's learning rate most exactly within the budget, and what else there is for its price.

    Considered are head_dim times powers of two below the target's width, at least as many neighbouring ones as a
    verdict needs, with few seeds or many; chosen is what fits the budget with the smallest expected error of the
    learning rate extrapolated to the target's width. If none fits, ladders too short for a verdict are considered. Times
    come from finished cells in `out`, else from a few steps per width, and where the budget is FLOPs only of the widths
    that were chosen.

    Args:
        out: Folder of the sweep; only finished cells are read.
        tell: Told what is being timed, line by line.

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
    candidates, pace = _candidates(target), Pace(read_results(out))

    def designs() -> list[Plan]:
        whole = [(*choice, grid) for choice in _choices(candidates) for grid in (FULL, LEAN)]
        short = [(*choice, LEAN) for choice in _short_ladders(target)]
        return [_design(target, *choice, engine.workers, pace, corpus) for choice in (*whole, *short)]

    def best() -> Plan | None:
        fitting = [plan for plan in designs() if plan.flops <= most_flops and plan.sweep_s <= budget.most_s]
        return min(fitting, key=lambda plan: (plan.is_short, plan.lr_error, plan.flops), default=None)

    most_flops = budget.most_flops(run_flops(target, corpus.vocab_size))
    plan = best()  # where nothing is known of time, it costs none
    if plan and not pace.known:
        _probe(target, candidates if budget.minutes else plan.widths, engine, corpus, pace, tell)
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
    return plan.widths, plan.seeds, plan.octaves


def _worth_their_price(plans: Iterable[Plan]) -> list[Plan]:
    """Those that no cheaper one equals within a tenth of its error, cheapest first."""
    kept: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.flops, plan.lr_error)):
        if not kept or plan.lr_error < 0.9 * kept[-1].lr_error:
            kept.append(plan)
    return kept


def _candidates(target: TrainConfig) -> list[int]:
    """Proxy widths to choose from, ascending."""
    powers = (target.head_dim * 2**power for power in itertools.count())
    widths = list(itertools.takewhile(lambda width: width < target.width, powers))
    if len(widths) < Thresholds.min_widths:
        least = target.head_dim * 2**Thresholds.min_widths
        raise ConfigError(
            f"width={target.width} leaves no room for {Thresholds.min_widths} proxy widths from head_dim="
            f"{target.head_dim} up, each twice the one before; plan for a width of {least} or more, or with a smaller --head-dim"
        )
    return widths


def _choices(candidates: list[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Neighbouring widths, at least as many as a verdict needs, and their numbers of seeds."""
    for first, last in itertools.combinations(range(len(candidates) + 1), 2):
        count = last - first
        if count >= Thresholds.min_widths:
            for widest in SEEDS:
                seeds = tuple(min(MOST_SEEDS, widest * 2**narrower) for narrower in reversed(range(count)))
                yield tuple(candidates[first:last]), seeds
            yield tuple(candidates[first:last]), (2,) + (1,) * (count - 1)  # the cheapest that shows its noise


def _short_ladders(target: TrainConfig) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cheaper than any of `_choices`: widths of one, two and three heads, which span too little for a verdict."""
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
    pace: Pace,
    corpus: Corpus,
) -> Plan:
    """What one choice costs and how well it will do."""
    octaves, added = grid
    runs = [count * (len(octaves) + len(added)) for count in seeds]
    flops = [run_flops(replace(target, width=width), corpus.vocab_size) for width in widths]
    seconds = [pace.seconds(width, cost) for width, cost in zip(widths, flops, strict=True)]
    whole = run_flops(target, corpus.vocab_size)
    return Plan(
        target=target,
        widths=widths,
        seeds=seeds,
        octaves=octaves,
        refine=octaves == FULL[0],
        runs=sum(runs),
        flops=sum(count * cost for count, cost in zip(runs, flops, strict=True)),
        target_flops=whole,
        workers=workers,
        sweep_s=max(sum(count * each for count, each in zip(runs, seconds, strict=True)) / workers, *seconds),
        target_s=whole / (workers * pace.flops_per_s(widths[-1])) if pace.known else 0.0,
        lr_error=expected_lr_error(widths, seeds, octaves + added, target.width),
    )


def expected_lr_error(widths: Sequence[int], seeds: Sequence[int], octaves: Sequence[float], target: int) -> float:
    """Standard error, in octaves, of a weighted line through the optima of `widths`, followed to the width `target`.

    One optimum is the vertex -b / 2c of a parabola through points u about their middle; b has variance
    noise**2 / sum(u**2) / seeds. Simulated sweeps did up to 1.4 times worse.
    """
    middle = sum(octaves) / len(octaves)
    squares = sum((u - middle) ** 2 for u in octaves)
    weights = [4 * squares * count / NOISE_OVER_CURVATURE**2 for count in seeds]
    doublings = [math.log2(width / target) for width in widths]
    mean = sum(w * at for w, at in zip(weights, doublings, strict=True)) / sum(weights)
    spread = sum(w * (at - mean) ** 2 for w, at in zip(weights, doublings, strict=True))
    return math.sqrt(1 / sum(weights) + mean**2 / spread)


def _probe(target: TrainConfig, widths: Sequence[int], engine: Engine, corpus: Corpus, pace: Pace, tell: Tell) -> None:
    """Teach `pace` how long runs take: a few steps per width, on all workers at once, as a sweep would run them."""
    base, arm = _proxy_base(target), _arm(target)
    chunk = target.val_chunk_tokens
    val_tokens = min(target.val_tokens, max(chunk, PROBE_VAL_TOKENS // chunk * chunk))
    base = replace(base, iterations=PROBE_STEPS, kernel_warmup=max(target.kernel_warmup, 1), val_tokens=val_tokens)
    left_out = (target.val_tokens - val_tokens) / (PROBE_STEPS * target.batch_tokens) * FORWARD_SHARE
    with tempfile.TemporaryDirectory() as scratch:
        for width in widths:
            sweep = Sweep(base, (width,), (arm,))
            cells = [sweep.cell(arm, width, 0.0, seed, corpus) for seed in range(engine.workers)]
            if pace.seconds(width, cells[0].flops) > PROBE_S:
                break
            tell(f"timing: {PROBE_STEPS} steps of width {width}, {engine.workers} at a time")
            for turn in ("cold", "warm")[width != widths[0] :]:  # a worker's first run imports what it needs
                for cell, outcome in engine.run(iter(cells), Path(scratch)):
                    if isinstance(outcome, Failure):
                        raise ConfigError(f"timing {cell} failed: {outcome.why}; fix that first")
                    if turn == "warm":
                        pace.learn(replace(outcome, seconds=outcome.seconds + left_out * outcome.train_s))


def planned(target: TrainConfig, out: Path, budget: Mapping[str, float]) -> Plan | None:
    """The plan in `out`, if one was made for this budget, or none is given.

    ConfigError for another target or other data, if any of its runs were made; a plan alone may be replaced.
    """
    if not (out / PLAN).exists():
        return None
    content = _read_plan(out)
    found = _target(content, out)
    mine, theirs = computed_settings(target), computed_settings(found)
    differ = [f"{key} was {theirs[key]}, is {mine[key]}" for key in mine if mine[key] != theirs[key]]
    if not find_corpus(target.data, target.tokenizer)[0].is_known_as(content["corpus"]):
        differ.append(f"data={target.data} is not the corpus that it was made on")
    if differ and not read_results(out):
        return None
    if differ:
        raise ConfigError(f"{out} holds another plan, and runs of it: {'; '.join(differ)}; choose another --out")
    if budget and dict(budget) != content["budget"]:
        return None
    values: dict[str, Any] = {entry.name: content[entry.name] for entry in fields(Plan)}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Plan(**values | lists | {"target": found})


def run_plan(plan: Plan, out: Path, engine: Engine, **options: Any) -> SweepResult:
    """Run the sweeps of a plan one after another, widest last, until one stops or fails. options: of `run_sweep`.

    A budget of FLOPs is kept: a grid is extended only with what the planned cells leave of it; where that is too little, the
    result is `used_up`.
    """
    budget = _read_plan(out)["budget"]
    most = min(budget.get("budget_flops", math.inf), budget.get("budget_share", math.inf) * plan.target_flops)
    corpus, _ = find_corpus(plan.target.data, plan.target.tokenizer)
    waiting = {  # FLOPs of planned cells that are not done
        width: seeds * plan.points * run_flops(replace(plan.target, width=width), corpus.vocab_size)
        for width, seeds in zip(plan.widths, plan.seeds, strict=True)
    }
    finished = [cell for cell in read_results(out) if cell.width in waiting]
    for cell in finished:
        waiting[cell.width] -= cell.flops
    left = ran = 0
    for sweep in plan.sweeps:
        waiting = {width: flops for width, flops in waiting.items() if width not in sweep.widths}
        reserved = sum(max(flops, 0.0) for flops in waiting.values())
        part = len(finished) + ran, plan.runs
        result = run_sweep(sweep, out, engine, budget_flops=most - reserved, part=part, **options)
        left, ran = left + result.left, ran + result.ran
        if not result.complete and not result.used_up:
            return replace(result, left=left, ran=ran)
    return replace(result, left=left, ran=ran, used_up=left > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and comparison
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What the sweep says about the target run; intervals hold 90 %.

    lr_scale: what to give the target. verdict: of the transfer measurement. method: of both forecasts, in words.
    wide: why the interval of the loss is wide, where it is.
    """

    width: int
    lr_scale: float
    lr_scale_interval: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]
    verdict: str
    method: str
    wide: str = ""

    @staticmethod
    def from_json(values: dict[str, Any]) -> Prediction:
        """From the object in plan.json."""
        pairs: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return Prediction(**(values | pairs))

    def summary(self) -> str:
        """For a terminal."""
        (slow, fast), (low, high) = self.lr_scale_interval, self.loss_interval
        return (
            f"width {self.width}: use --lr-scale {self.lr_scale:.4g} (90 % {slow:.4g} to {fast:.4g})\n"
            f"expect a validation loss of {self.loss:.4f} (90 % {low:.4f} to {high:.4f})\n"
            f"transfer: {self.verdict}; {self.method}"
        )


def predict(out: Path) -> Prediction:
    """Learning rate and loss of the target from the finished sweep in `out`; also written to its plan.json.

    Raises ConfigError without a plan, TransferError if the sweep does not bear a forecast.
    """
    content = _read_plan(out)
    target = _target(content, out)
    name = _arm(target).name
    arm = measure_sweep(out, [name]).arms[name]
    try:
        forecast = loss_forecast(arm, target.width)
    except TransferError as fault:
        raise TransferError(f"{fault}; or plan again with a larger --budget, for more seeds and widths") from None
    slow, fast = forecast.log2_lr.interval()
    if math.isnan(slow):
        raise ConfigError(f"{out}: with one seed the noise is unknown, and so is every interval; run a second seed")
    prediction = Prediction(
        width=target.width,
        lr_scale=target.lr_scale * 2**forecast.log2_lr.value,
        lr_scale_interval=(target.lr_scale * 2**slow, target.lr_scale * 2**fast),
        loss=forecast.loss.value,
        loss_interval=forecast.loss.interval(),
        verdict=arm.verdict.value,
        method=forecast.method,
        wide=_why_wide(arm, forecast),
    )
    write_whole(out / PLAN, json.dumps(content | {"prediction": asdict(prediction)}, indent=1, allow_nan=False) + "\n")
    return prediction


def _why_wide(arm: ArmResult, forecast: Forecast) -> str:
    """A sentence where the interval of the loss is far wider than the scatter of runs alone would make it."""
    low, high = forecast.loss.interval()
    if not high - low > WIDE * arm.noise.total > 0:
        return ""
    widths, seeds = [fit.width for fit in arm.usable], [len(fit.cells.losses) for fit in arm.usable]
    reasons = []
    if len(widths) < LAW_WIDTHS:
        reasons.append(f"{len(widths)} widths do not tell how the loss falls with width: more widths narrow it")
    if min(seeds) < FEW_SEEDS:
        reasons.append(
            f"seeds are few ({', '.join(map(str, seeds))} at widths {', '.join(map(str, widths))}): more narrow it"
        )
    why = ", and because ".join(reasons) or f"width {forecast.width} is far from the widths of the sweep"
    return f"the interval is {(high - low) / arm.noise.total:.0f} standard deviations of one run wide because {why}"


def advised(out: Path) -> TrainConfig:
    """The target of the plan in `out`, with the learning rate that was predicted. Raises ConfigError before `predict`."""
    target, prediction = _predicted(out)
    return replace(target, lr_scale=prediction.lr_scale)


@dataclass(frozen=True)
class Comparison:
    """Predicted against measured. octaves: learning rate used over the predicted one, log2."""

    prediction: Prediction
    measured: float
    octaves: float

    @property
    def inside(self) -> bool:
        """Whether the measured loss lies in the predicted interval."""
        low, high = self.prediction.loss_interval
        return low <= self.measured <= high

    @property
    def miss(self) -> str:
        """How far off the prediction was, in words."""
        low, high = self.prediction.loss_interval
        apart, where = self.measured - self.prediction.loss, "inside" if self.inside else "outside"
        return f"missed by {apart:+.4f} nats; {where} the 90 % interval ({low:.4f} to {high:.4f})"

    def summary(self) -> str:
        """For a terminal."""
        predicted = f"validation loss: predicted {self.prediction.loss:.4f}, measured {self.measured:.4f}"
        lines = [f"{predicted}: {self.miss}", *([self.prediction.wide] if self.prediction.wide else [])]
        if abs(self.octaves) > 0.01:
            lines.append(f"the run's learning rate is 2^{self.octaves:+.2f} times the predicted one")
        return "\n".join(lines)


def compare(out: Path, run: Path) -> Comparison:
    """The prediction in the plan.json of `out` against the finished target run in the folder `run`.

    Raises ConfigError if there is no prediction, if the run is not at its end, or if it is not the target that was
    planned; another learning rate or seed is no obstacle.
    """
    planned, prediction = _predicted(out)
    done = saved_config(run)
    if not find_corpus(done.data, done.tokenizer)[0].is_known_as(_read_plan(out)["corpus"]):
        raise ConfigError(
            f"{run} is not the planned run: it was trained on other data; compare the run that was planned"
        )
    mine, theirs = computed_settings(planned), computed_settings(done)
    differ = [key for key in mine if mine[key] != theirs[key] and key not in ("lr_scale", "seed")]
    if differ:
        changes = "; ".join(f"{key} was planned as {mine[key]}, is {theirs[key]}" for key in differ)
        raise ConfigError(f"{run} is not the planned run: {changes}; compare the run that was planned")
    losses = [row["loss"] for row in read_metrics(run) if row["kind"] == "val" and row["step"] == done.iterations]
    if not losses or losses[-1] is None:
        raise ConfigError(f"{run} has no loss at step {done.iterations}; train it to its end first")
    return Comparison(prediction, losses[-1], math.log2(done.lr_scale / prediction.lr_scale))


def read_plan(out: Path) -> tuple[TrainConfig, Prediction | None]:
    """The target in the plan.json of `out`, and the prediction if there is one. Raises ConfigError without a plan."""
    content = _read_plan(out)
    prediction = content["prediction"] and Prediction.from_json(content["prediction"])
    return _target(content, out), prediction


def _read_plan(out: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(out / PLAN))
        needed = {entry.name for entry in fields(Plan)} | {"corpus", "budget", "prediction"}
        promised = {entry.name for entry in fields(Prediction)}
        whole = (
            needed <= content.keys()
            and promised - {"wide"} <= (content["prediction"] or dict.fromkeys(promised)).keys() <= promised
        )
        if content["version"] != VERSION or not whole:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{printable(out / PLAN)} is missing or damaged; make a plan first") from None
    return content


def _predicted(out: Path) -> tuple[TrainConfig, Prediction]:
    target, prediction = read_plan(out)
    if not prediction:
        raise ConfigError(f"{out / PLAN} holds no prediction yet; finish the sweep and predict first")
    return target, prediction


def _target(content: dict[str, Any], out: Path) -> TrainConfig:
    return from_json(json.dumps(content["target"]), out / PLAN)
