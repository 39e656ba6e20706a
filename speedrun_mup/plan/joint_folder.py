"""The plan.json of a plan over several sizes: running it, what it predicts, and what came of it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from speedrun_mup.config import TrainConfig, computed_settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.files import printable, read_bytes, write_whole
from speedrun_mup.plan.design import Budget, arm_of
from speedrun_mup.plan.folder import PLAN, read_prediction, target_in
from speedrun_mup.plan.joint import JointPlan
from speedrun_mup.plan.known import known_in, what_is_known, without_rule
from speedrun_mup.plan.prediction import finished_run, miss
from speedrun_mup.sweep import Engine, RunResult, Sweep, SweepResult, measure_sweep_surface, read_results, run_sweep
from speedrun_mup.sweep.result import Place, mean_losses
from speedrun_mup.transfer import Estimate, Surface, TransferError
from speedrun_mup.transfer.axes import told_sizes

KIND = "joint"


@dataclass(frozen=True)
class JointPrediction:
    """What the proxies say about the target; intervals hold 90 %.

    Args:
        sizes: Of the target.
        lr_scale: What to give it; lr_scale_interval: where the best may lie.
        loss: With the scatter of one run.
        drifts: Size -> drift per doubling, log2, with its interval; loss_exponents: alike.
        verdicts: Size -> whether the rule in force holds over it.
        outside: Size -> doublings beyond the largest proxy.
        method: What the rate follows.
        followed: Sizes without a rule, whose drift the rate follows as measured.
    """

    sizes: dict[str, int]
    lr_scale: float
    lr_scale_interval: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]
    drifts: dict[str, tuple[float, float, float]]
    loss_exponents: dict[str, tuple[float, float, float]]
    verdicts: dict[str, str]
    outside: dict[str, float]
    method: str
    followed: tuple[str, ...] = ()

    def summary(self) -> str:
        """For a terminal."""
        (slow, fast), (low, high) = self.lr_scale_interval, self.loss_interval
        lines = [
            f"{told_sizes(self.sizes)}: use --lr-scale {self.lr_scale:.4g} (90 % {slow:.4g} to {fast:.4g})",
            f"expect a validation loss of {self.loss:.4f} (90 % {low:.4f} to {high:.4f})",
            f"rate: {self.method}",
        ]
        for name, (drift, lowest, highest) in self.drifts.items():
            p, small, large = self.loss_exponents[name]
            judged = "no rule: followed" if name in self.followed else f"against the rule: {self.verdicts[name]}"
            lines.append(
                f"{name}: drift {drift:+.2f} per doubling (90 % {lowest:+.2f} to {highest:+.2f}), {judged}; loss "
                f"exponent {p:.2f} ({small:.2f} to {large:.2f}); {self.outside[name]:.2g} doublings beyond the proxies"
            )
        return "\n".join(lines)


def save_joint_plan(plan: JointPlan, out: Path, budget: Budget) -> None:
    """Write plan.json in the folder `out`. Raises ConfigError if it holds runs of another plan."""
    corpus, _ = find_corpus(plan.target.data, plan.target.tokenizer)
    most = budget.most_flops(plan.target_flops)
    about = {"kind": KIND, "corpus": corpus.fingerprint, "budget": asdict(budget), "prediction": None}
    content = asdict(plan) | about | {"budget_flops": most if math.isfinite(most) else None}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    if (out / PLAN).exists() and read_results(out):
        before, now = json.loads(read_bytes(out / PLAN)), json.loads(text)
        same = before.keys() & now.keys() - {"sweep_s", "workers"}  # of earlier editions there is less
        if any(before[key] != now[key] for key in same - {"prediction"}):
            raise ConfigError(f"{printable(out)} holds another plan, and runs of it; choose another --out")
        return
    write_whole(out / PLAN, text)


def load_joint_plan(
    target: TrainConfig, names: Sequence[str], budget: Budget, priors: Mapping[str, Any], out: Path
) -> JointPlan | None:
    """The plan in `out`, if it was made for the same: a budget in time would give another one each time.

    Args:
        target: Settings of the run to plan for.
        names: Sizes in which proxies are smaller.
        budget: That was asked for.
        priors: That were given.
        out: The folder.
    """
    if not is_joint(out):
        return None
    plan, content = read_joint_plan(out)
    corpus, _ = find_corpus(target.data, target.tokenizer)
    same = content.get("budget") == asdict(budget) and [*plan.sizes] == [*names] and plan.priors == priors
    same = same and computed_settings(plan.target) == computed_settings(target)
    return plan if same and corpus.is_known_as(content["corpus"]) else None


def is_joint(out: Path) -> bool:
    """Whether the folder `out` holds a plan over several sizes."""
    try:
        return bool(json.loads(read_bytes(out / PLAN))["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read_joint_plan(out: Path) -> tuple[JointPlan, dict[str, Any]]:
    """The plan in `out`, and all of its plan.json. Raises ConfigError for none, or a damaged one."""
    try:
        content = json.loads(read_bytes(out / PLAN))
        values = {entry.name: content[entry.name] for entry in fields(JointPlan) if entry.name in content}
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        plan = JointPlan(**values | lists | {"target": target_in(content, out)})
        known_in(plan.priors, list(plan.sizes))
        if content["kind"] != KIND or {tuple(place) for place in plan.places} != {tuple(plan.sizes)}:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{printable(out / PLAN)} is missing or damaged; make a plan first") from None
    return plan, content


def run_joint_plan(plan: JointPlan, out: Path, engine: Engine, **options: Any) -> SweepResult:
    """Run the proxies, the base first, within the FLOPs of the plan's budget. options: of `run_sweep`.

    Where the base's best rate is far from what the settings say, the grids of the others lie around it.
    """
    most, ran = read_joint_plan(out)[1]["budget_flops"] or math.inf, 0
    for number, planned in enumerate(plan.sweeps):
        results = read_results(out)
        part = len(results), plan.runs
        sweep = _around_the_best(planned, plan.sweeps[:number], results)
        result = run_sweep(sweep, out, engine, budget_flops=most, part=part, **options)
        ran += result.ran
        if not result.complete:
            break
    return replace(result, ran=ran)


def _around_the_best(sweep: Sweep, earlier: Collection[Sweep], results: Iterable[RunResult]) -> Sweep:
    """`sweep` with its grid around the best rate of the finished `earlier` ones of its plan, to whole factors of 2.

    Rates that were tuned on other data, or for another batch, may be off by a factor of 4; the grid would grow there at
    each size again.
    """
    places, before = {place for one in earlier for place in one.places}, defaultdict[Place, dict[float, float]](dict)
    for (_, place, at), loss in mean_losses(results).items():
        if place in places and math.isfinite(loss):
            before[place][at] = loss
    best = sorted(min(curve, key=curve.__getitem__) for curve in before.values())
    middle = (min(sweep.log2_factors) + max(sweep.log2_factors)) / 2
    shift = math.trunc(best[len(best) // 2] - middle) if best else 0
    if abs(shift) < 2:
        return sweep
    return replace(sweep, log2_factors=tuple(at + shift for at in sweep.log2_factors))


def joint_surface(plan: JointPlan, out: Path) -> Surface:
    """The surface through the finished proxies of `plan` in `out`. Raises TransferError if they do not bear one."""
    name = arm_of(plan.target).name
    known = what_is_known(plan.target, plan.priors, list(plan.sizes))
    return measure_sweep_surface(out, [name], known=known).arms[name]


def predict_joint(out: Path) -> JointPrediction:
    """Rate and loss of the target from the finished proxies in `out`; also written to its plan.json.

    A size for which no rule is in force is followed as measured; one that a rule covers only where its drift is shown to
    differ from the rule. Raises ConfigError without a plan, TransferError if the runs do not bear a forecast.
    """
    plan, content = read_joint_plan(out)
    target, surface = plan.target, joint_surface(plan, out)
    forecast = surface.predict(plan.sizes)
    if len(forecast.loss.draws) == 1:
        raise TransferError(f"{out}: with one seed the noise is unknown, and so is every interval; run a second seed")
    slow, fast = forecast.log2_value.interval()
    prediction = JointPrediction(
        sizes=plan.sizes,
        lr_scale=target.lr_scale * 2**forecast.log2_value.value,
        lr_scale_interval=(target.lr_scale * 2**slow, target.lr_scale * 2**fast),
        loss=forecast.loss.value,
        loss_interval=forecast.loss.interval(),
        drifts={axis.name: _with_interval(axis.drift) for axis in surface.drifts},
        loss_exponents={axis.name: _with_interval(axis.loss_exponent) for axis in surface.drifts},
        verdicts={axis.name: axis.verdict.value for axis in surface.drifts},
        outside=forecast.outside,
        method=f"{forecast.advice}; {forecast.distance}",
        followed=tuple(without_rule(target, list(plan.sizes))),
    )
    write_whole(out / PLAN, json.dumps(content | {"prediction": asdict(prediction)}, indent=1, allow_nan=False) + "\n")
    return prediction


def _with_interval(estimate: Estimate) -> tuple[float, float, float]:
    return (estimate.value, *estimate.interval())


def read_joint_prediction(out: Path) -> JointPrediction:
    """What `predict_joint` wrote. Raises ConfigError before it."""
    found = read_joint_plan(out)[1]["prediction"]
    if not found:
        raise ConfigError(f"{printable(out / PLAN)} holds no prediction yet; finish the proxies with --run first")
    pairs = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    return JointPrediction(**found | pairs)


def recommended_config(out: Path) -> TrainConfig:
    """The target of the plan in `out`, with the learning rate that was predicted. Raises ConfigError before that."""
    if is_joint(out):
        return replace(read_joint_plan(out)[0].target, lr_scale=read_joint_prediction(out).lr_scale)
    target, prediction = read_prediction(out)
    return replace(target, lr_scale=prediction.lr_scale)


@dataclass(frozen=True)
class JointComparison:
    """Predicted against measured.

    Args:
        prediction: What the proxies said.
        measured: The target's loss.
        lr_scale: What it was trained with.
        share: FLOPs of all proxies that ran over the target's.
    """

    prediction: JointPrediction
    measured: float
    lr_scale: float
    share: float

    @property
    def miss(self) -> str:
        """How far off the prediction was, as a sentence."""
        return miss(self.prediction.loss, self.prediction.loss_interval, self.measured)

    @property
    def rate(self) -> str:
        """How the run's rate lies to the predicted one, as a sentence; nothing if they are the same."""
        log2_factor = math.log2(self.lr_scale / self.prediction.lr_scale)
        if abs(log2_factor) <= 0.01:
            return ""
        slow, fast = self.prediction.lr_scale_interval
        inside = "inside" if slow <= self.lr_scale <= fast else "outside"
        return f"the run's learning rate is 2^{log2_factor:+.2f} times the predicted one, {inside} its 90 % interval"

    def summary(self) -> str:
        """For a terminal."""
        lines = [
            f"validation loss: predicted {self.prediction.loss:.4f}, measured {self.measured:.4f}: {self.miss}",
            f"cost of the proxies: {self.share:.2%} of the run's FLOPs",
        ]
        return "\n".join([*lines, *([self.rate] if self.rate else [])])


def compare_joint(out: Path, run: Path) -> JointComparison:
    """The prediction in `out` against the finished target run in the folder `run`.

    Raises ConfigError if there is no prediction, or the run is not the target at its end; another rate or seed is none.
    """
    plan, content = read_joint_plan(out)
    prediction = read_joint_prediction(out)
    done, measured = finished_run(plan.target, content["corpus"], run)
    spent = sum(result.flops for result in read_results(out))
    return JointComparison(prediction, measured, done.lr_scale, spent / plan.target_flops)
