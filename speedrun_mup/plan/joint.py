"""A plan over several sizes: proxies smaller than the target in all of them, what they cost, and how sharp they will be.

The proxies are a designed set, not a grid: a base, one and two doublings along each axis, and one doubling on all axes at
once, which shows whether the axes add or multiply. An axis whose drift is known from elsewhere may do with one doubling. Where
the base lies and how many runs each place gets is chosen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.plan.design import (
    FULL,
    LEAN,
    NOISE_OVER_CURVATURE,
    Budget,
    NoPlanFits,
    Tell,
    arm_of,
    probe,
    proxy_base,
)
from speedrun_mup.plan.known import what_is_known
from speedrun_mup.sweep import CostModel, Engine, Sweep
from speedrun_mup.training.flops import flops_per_token, run_flops
from speedrun_mup.training.tracking import clock
from speedrun_mup.transfer import Axes, Known, Prior, Thresholds
from speedrun_mup.transfer.axes import Sizes, size_axis, sized, told_sizes
from speedrun_mup.transfer.law import ANY_EXPONENT, COUPLING, law_derivatives

FEWEST_STEPS = 64  # of a proxy: momentum of 0.95 remembers 20, and is a part of what is tuned
FEWEST_LAYERS = 2
SEEDS = (1, 2, 3)  # of every place; the base, from which all doublings count, has twice as many
# What a doubling of each size does to the loss of a small language model, nats, and the scatter of one run: they only serve
# to say in advance how wide the interval of the loss will be.
USUAL_GAIN = {"width": 0.1, "n_layer": 0.04, "batch_tokens": 0.05, "tokens": 0.15}
USUAL_NOISE, USUAL_LOSS = 0.007, 2.8
SHARP = 0.1  # nats: as good an interval of the loss as Thresholds.equivalence is one of the rate
NINETY = 2 * 1.645  # standard deviations that 90 % of a normal distribution span


@dataclass(frozen=True)
class JointPlan:
    """A designed set of proxies.

    Args:
        target: Settings of the run that is planned for.
        sizes: Where it lies on the axes.
        places: Of the proxies, the base first.
        seeds: Of each place.
        log2_factors: The grid.
        refine: Whether half steps are added.
        runs: With what growing and refining the grid usually adds.
        flops: Of the proxies; target_flops: of the target.
        value_error: Expected standard error of the target's best rate, log2.
        loss_width: Expected width of the 90 % interval of its loss, nats.
        priors: Exponents measured elsewhere, as `known.known_in` reads them.
        sweep_s: Seconds of the proxies on this machine with so many `workers`; 0 where only FLOPs were asked for.
    """

    target: TrainConfig
    sizes: dict[str, int]
    places: tuple[dict[str, int], ...]
    seeds: tuple[int, ...]
    log2_factors: tuple[float, ...]
    refine: bool
    runs: int
    flops: float
    target_flops: float
    value_error: float
    loss_width: float
    priors: dict[str, Any]
    sweep_s: float = 0.0
    workers: int = 1

    @property
    def sweeps(self) -> tuple[Sweep, ...]:
        """What to run, all in one folder: one sweep for each number of seeds."""
        held = self.sizes.get("tokens") or self.target.schedule.tokens
        options: dict[str, Any] = (
            {"held_tokens": held} if "batch_tokens" in self.sizes and "tokens" not in self.sizes else {}
        )
        found = []
        for count in sorted(set(self.seeds), reverse=True):  # the base first
            some = tuple(place for place, seeds in zip(self.places, self.seeds, strict=True) if seeds == count)
            axes = Axes(next(iter(self.sizes)), "lr_scale")
            arms, seeds = (arm_of(self.target),), tuple(range(count))
            base = proxy_base(self.target)
            found.append(Sweep(base, some, arms, self.log2_factors, seeds, axes, refine=self.refine, **options))
        return tuple(found)

    def summary(self) -> str:
        """For a terminal."""
        base, most = self.places[0], {name: max(place[name] for place in self.places) for name in self.sizes}
        far = ", ".join(f"{name} {size / most[name]:.3g}" for name, size in self.sizes.items())
        time = f"; about {clock(self.sweep_s)} with {self.workers} workers" if self.sweep_s else ""
        return "\n".join(
            [
                f"target: {told_sizes(self.sizes)}; {self.target_flops:.3g} FLOPs",
                f"proxies: {len(self.places)} places from {told_sizes(base)} up to {told_sizes(most)}, one size at a time; "
                f"{min(self.seeds)} to {max(self.seeds)} seeds, about {self.runs} runs",
                f"the target is larger than the largest proxy by a factor of: {far}",
                f"cost: {self.flops:.3g} FLOPs, {self.flops / self.target_flops:.2%} of the target run{time}",
                f"the learning rate will be known within a factor of about {2**self.value_error:.2f} (standard error), the loss "
                f"within an interval about {self.loss_width:.2f} nats wide (90 %)",
            ]
        )


def whole_target(target: TrainConfig, batch_tokens: int | None, tokens: int | None) -> TrainConfig:
    """The target with so many tokens a step and in all, each the nearest that whole micro-batches and steps make."""
    micro = target.micro_batch_tokens
    if batch_tokens is not None:
        target = sized(target, {"batch_tokens": max(1, round(batch_tokens / micro)) * micro})
    if tokens is not None:
        steps = max(1, round(tokens * target.iterations / target.schedule.tokens))
        target = replace(target, iterations=steps)
    return target


def choose_joint_plan(
    target: TrainConfig,
    names: Sequence[str],
    budget: Budget,
    priors: dict[str, Any] | None = None,
    engine: Engine | None = None,
    tell: Tell = lambda line: None,
) -> JointPlan:
    """The proxies that say most about the target's rate and loss within the budget.

    Args:
        target: Settings of the run to plan for.
        names: Sizes in which proxies are smaller: width, n_layer, batch_tokens, tokens.
        budget: FLOPs, a share of the target's, or time.
        priors: Exponents measured elsewhere, as `known.known_in` reads them: the sharper they are, the less needs to be run.
        engine: Where runs would take place, to time a few steps of each width for a budget in time.
        tell: Receives what is being timed, line by line.

    Raises:
        NoPlanFits: Nothing fits the budget; it says what the smallest costs.
        ConfigError: For an axis on which the target leaves no room for three values, and without a budget.
    """
    if budget == Budget() or (budget.minutes is not None and engine is None):
        raise ConfigError("a plan over several sizes needs a budget; give --budget, such as 2%, 1e15 FLOPs, or 30m")
    sizes, priors = {name: size_axis(name).of(target) for name in names}, priors or {}
    known, prices = what_is_known(target, priors, names), _Prices(target)
    designs = list(_designs(target, sizes, known))
    if engine is not None and budget.minutes is not None:
        prices.time({place.get("width", target.width) for places in designs for place in places}, engine, tell)
    best: JointPlan | None = None
    least: JointPlan | None = None
    for places in designs:
        costs = [prices.flops(place) for place in places]
        times = [prices.seconds(place, flops) for place, flops in zip(places, costs, strict=True)]
        for (factors, added), count in itertools.product((FULL, LEAN), SEEDS):
            seeds = (max(2, 2 * count), *[count] * (len(places) - 1))
            points = len(factors) + len(added)
            spent = points * sum(seed * cost for seed, cost in zip(seeds, costs, strict=True))
            took = points * sum(seed * each for seed, each in zip(seeds, times, strict=True))
            if best is not None and spent > budget.most_flops(prices.whole):
                continue
            rate, loss = expected_errors(places, seeds, factors + added, sizes, known)
            plan = JointPlan(
                *(target, sizes, places, seeds, factors, factors == FULL[0], points * sum(seeds)),
                *(spent, prices.whole, rate, loss, priors, max(took / prices.workers, *times), prices.workers),
            )
            least = min((plan, least or plan), key=lambda one: one.sweep_s or one.flops)
            if budget.holds(plan):
                best = min((plan, best or plan), key=_score)
    if least is None:
        raise _no_room("tokens", sizes["tokens"], 16 * FEWEST_STEPS * target.micro_batch_tokens)
    if best is None:
        time = f" and {least.sweep_s / 60:.1f} minutes here" if least.sweep_s else ""
        cost = f"{least.flops:.3g} FLOPs ({least.flops / prices.whole:.2%} of the target run){time}"
        what = f"no plan over {', '.join(names)} fits the budget: the smallest takes {cost}"
        raise NoPlanFits(what, budget.enough_for(least))
    return best


class _Prices:
    """What runs cost: FLOPs, and seconds once they were timed.

    Attributes:
        whole: FLOPs of the target.
        workers: That run at a time.
    """

    def __init__(self, target: TrainConfig):
        self._target, self._corpus = target, find_corpus(target.data, target.tokenizer)[0]
        self._per_token: dict[tuple[int, int], float] = {}
        self._costs, self.workers = CostModel(), 1
        self.whole = run_flops(target, self._corpus.vocab_size)

    def flops(self, place: Sizes) -> float:
        """Of one run."""
        target = self._target
        shape = place.get("width", target.width), place.get("n_layer", target.n_layer)
        if shape not in self._per_token:
            cfg = replace(target, width=shape[0], n_layer=shape[1])
            self._per_token[shape] = flops_per_token(cfg, self._corpus.vocab_size)
        return self._per_token[shape] * place.get("tokens", target.schedule.tokens)

    def seconds(self, place: Sizes, flops: float) -> float:
        """Of one run with so many FLOPs; 0 before `time`."""
        return self._costs.seconds({"width": place.get("width", self._target.width)}, flops)

    def time(self, widths: set[int], engine: Engine, tell: Tell) -> None:
        """Take a few steps of each width."""
        probe(self._target, sorted(widths), engine, self._corpus, self._costs, tell)
        self.workers = engine.workers


def _score(plan: JointPlan) -> tuple[float, float]:
    return plan.value_error / Thresholds.equivalence + plan.loss_width / SHARP, plan.flops


def _designs(target: TrainConfig, sizes: Sizes, known: Known) -> Iterator[tuple[dict[str, int], ...]]:
    """Sets of places, the base first: with two doublings of each size, and with one of those whose drift is known."""
    reaches = [dict.fromkeys(sizes, 4), {name: 2 if name in known.priors else 4 for name in sizes}]
    faults: list[ConfigError] = []
    for reach in reaches[: 1 + bool(known.priors)]:
        try:
            for base in _bases(target, sizes, reach):
                yield tuple(_places(base, reach))
        except ConfigError as fault:
            faults.append(fault)
    if len(faults) == 1 + bool(known.priors):
        raise faults[-1]


def _bases(target: TrainConfig, sizes: Sizes, reach: Sizes) -> Iterator[dict[str, int]]:
    """Places that the design may start from: the base and `reach` times it fit under the target, for each size."""
    ladders: dict[str, list[int]] = {}
    for name, least in (
        ("width", target.head_dim),
        ("n_layer", FEWEST_LAYERS),
        ("batch_tokens", target.micro_batch_tokens),
    ):
        if name in sizes:
            ladders[name] = _ladder(name, least, sizes[name], reach[name])
    for first in itertools.product(*ladders.values()):
        base = dict(zip(ladders, first, strict=True))
        if "tokens" not in sizes:
            yield {name: base[name] for name in sizes}
            continue
        most = reach["batch_tokens"] * base["batch_tokens"] if "batch_tokens" in base else target.batch_tokens
        if reach["tokens"] * most * FEWEST_STEPS <= sizes["tokens"]:
            for tokens in _ladder("tokens", most * FEWEST_STEPS, sizes["tokens"], reach["tokens"]):
                yield {name: (base | {"tokens": tokens})[name] for name in sizes}


def _ladder(name: str, least: int, target: int, reach: int) -> list[int]:
    """Bases on one axis, doublings of the least, of which `reach` times as much is up to the target."""
    powers = (least * 2**power for power in itertools.count())
    found = list(itertools.takewhile(lambda value: reach * value <= target, powers))
    if not found:
        raise _no_room(name, target, reach * least, reach)
    return found


def _no_room(name: str, target: int, enough: int, reach: int = 4) -> ConfigError:
    values = "three proxy values, each twice the one before" if reach == 4 else "two proxy values, one twice the other"
    what = f"{name}={target} leaves no room for {values}"
    return ConfigError(f"{what}; plan for {enough} or more, or leave {name} out of --axes")


def _places(base: Sizes, reach: Sizes) -> Iterator[dict[str, int]]:
    """The designed set: the base, one and two doublings along each size, one on all; of sizes that go up to twice the base,
    one doubling, next to one of the others."""
    yield dict(base)
    whole, known = [[name for name in base if reach[name] == most] for most in (4, 2)]
    for name, factor in itertools.product(whole, (2, 4)):
        yield {**base, name: base[name] * factor}
    beside = {**base, **{name: 2 * base[name] for name in whole}}
    yield from ({**beside, name: 2 * base[name]} for name in known)
    if len(whole) > 1:
        yield {name: 2 * value for name, value in base.items()}


def expected_errors(
    places: Sequence[Sizes], seeds: Sequence[int], log2_factors: Sequence[float], target: Sizes, known: Known
) -> tuple[float, float]:
    """Expected standard error of the best rate at `target`, log2, and width of the loss's 90 % interval, nats.

    From the design alone: an optimum is the vertex of a quadratic fit with the usual noise, the plane through them has the
    variance of weighted least squares, and the law that of its derivatives at usual gains, priors counted as observations.
    """
    names = list(target)
    at = np.log2([[place[name] / places[0][name] for name in names] for place in places])
    far = np.log2([target[name] / places[0][name] for name in names])
    middle = sum(log2_factors) / len(log2_factors)
    squares = sum((u - middle) ** 2 for u in log2_factors)
    counts = np.array(seeds, dtype=float)
    weights = 4 * squares * counts / NOISE_OVER_CURVATURE**2
    design, ahead = np.column_stack([np.ones(len(places)), at]), np.append(1.0, far)
    slopes = [_precision(known.priors.get(name)) for name in names]
    variance = np.linalg.inv((weights[:, None] * design).T @ design + np.diag([0.0, *slopes]))
    rate = math.sqrt(float(ahead @ variance @ ahead))

    gains = [USUAL_GAIN.get(name, 0.1) for name in names]
    exponents = [known.loss_priors.get(name, ANY_EXPONENT) for name in names]
    law = np.array([[USUAL_LOSS, *gains, *(prior.mean for prior in exponents), COUPLING.mean / USUAL_LOSS]])
    slope = law_derivatives(law, at)[0] * np.sqrt(counts)[:, None] / USUAL_NOISE
    priors = [0.0] * (1 + len(names)) + [_precision(prior) for prior in (*exponents, COUPLING)]
    priors[-1] *= USUAL_LOSS**2
    there = law_derivatives(law, far[None])[0, 0]
    spread = float(there @ np.linalg.inv(slope.T @ slope + np.diag(priors)) @ there) + USUAL_NOISE**2
    return rate, NINETY * math.sqrt(spread)


def _precision(prior: Prior | None) -> float:
    return 0.0 if prior is None else prior.sd**-2.0
