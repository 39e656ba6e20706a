"""plan.json: a plan and what was predicted, in the folder of its sweep; running the plan."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from speedrun_mup.config import TrainConfig, computed_settings
from speedrun_mup.config_file import from_json
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.files import printable, read_bytes, write_whole
from speedrun_mup.plan.design import Budget, Plan, Tell, choose_plan
from speedrun_mup.sweep import Engine, SweepResult, read_results, run_sweep
from speedrun_mup.training.flops import run_flops

PLAN, VERSION = "plan.json", 1


@dataclass(frozen=True)
class Prediction:
    """What the sweep says about the target run; intervals hold 90 %.

    lr_scale: what to give the target. verdict: of the transfer measurement. method: of both forecasts, as text.
    wide: why the interval of the loss is wide, where it is. bits_per_byte: what the loss comes to, where that is known.
    """

    width: int
    lr_scale: float
    lr_scale_interval: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]
    verdict: str
    method: str
    wide: str = ""
    bits_per_byte: float | None = None

    @staticmethod
    def from_json(values: dict[str, Any]) -> Prediction:
        """From the object in plan.json."""
        pairs: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return Prediction(**(values | pairs))

    def summary(self) -> str:
        """For a terminal."""
        (slow, fast), (low, high) = self.lr_scale_interval, self.loss_interval
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.3f} bits per byte"
        return (
            f"width {self.width}: use --lr-scale {self.lr_scale:.4g} (90 % {slow:.4g} to {fast:.4g})\n"
            f"expect a validation loss of {self.loss:.4f} (90 % {low:.4f} to {high:.4f}){bits}\n"
            f"transfer: {self.verdict}; {self.method}"
        )


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
    """Write plan.json in the folder `out`, for `load_plan` and `run_plan`."""
    corpus, _ = find_corpus(plan.target.data, plan.target.tokenizer)
    asked = {f"budget_{name}": value for name, value in asdict(budget).items() if value is not None}
    content = asdict(plan) | {"version": VERSION, "corpus": corpus.fingerprint, "budget": asked, "prediction": None}
    write_whole(out / PLAN, json.dumps(content, indent=1, allow_nan=False) + "\n")


def load_plan(target: TrainConfig, out: Path, budget: Mapping[str, float]) -> Plan | None:
    """The plan in `out`, if one was made for this budget, or none is given.

    ConfigError for another target or other data, if any of its runs were made; a plan alone may be replaced.
    """
    if not (out / PLAN).exists():
        return None
    content = read_content(out)
    found = target_in(content, out)
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

    A budget of FLOPs is kept: a grid is extended only with what the planned runs leave of it; where that is too little, the
    result is `used_up`.
    """
    budget = read_content(out)["budget"]
    most = min(budget.get("budget_flops", math.inf), budget.get("budget_share", math.inf) * plan.target_flops)
    corpus, _ = find_corpus(plan.target.data, plan.target.tokenizer)
    waiting = {  # FLOPs of planned runs that are not done
        width: seeds * plan.points * run_flops(replace(plan.target, width=width), corpus.vocab_size)
        for width, seeds in zip(plan.widths, plan.seeds, strict=True)
    }
    finished = [run for run in read_results(out) if run.size in waiting]
    for run in finished:
        waiting[run.size] -= run.flops
    left = ran = 0
    for sweep in plan.sweeps:
        waiting = {width: flops for width, flops in waiting.items() if width not in sweep.sizes}
        reserved = sum(max(flops, 0.0) for flops in waiting.values())
        part = len(finished) + ran, plan.runs
        result = run_sweep(sweep, out, engine, budget_flops=most - reserved, part=part, **options)
        left, ran = left + result.left, ran + result.ran
        if not result.complete and not result.used_up:
            return replace(result, left=left, ran=ran)
    return replace(result, left=left, ran=ran, used_up=left > 0)


def read_plan(out: Path) -> tuple[TrainConfig, Prediction | None]:
    """The target in the plan.json of `out`, and the prediction if there is one. Raises ConfigError without a plan."""
    content = read_content(out)
    prediction = content["prediction"] and Prediction.from_json(content["prediction"])
    return target_in(content, out), prediction


def read_content(out: Path) -> dict[str, Any]:
    """What is in the plan.json of `out`. Raises ConfigError if it is missing or damaged."""
    try:
        content = json.loads(read_bytes(out / PLAN))
        if "octaves" in content:  # of the first edition
            content["log2_factors"] = content.pop("octaves")
        needed = {entry.name for entry in fields(Plan)} | {"corpus", "budget", "prediction"}
        predicted = {entry.name: entry.default is MISSING for entry in fields(Prediction)}
        required = {name for name, is_required in predicted.items() if is_required}  # earlier editions had no more
        whole = needed <= content.keys() and required <= (content["prediction"] or predicted).keys() <= predicted.keys()
        if content["version"] != VERSION or not whole:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{printable(out / PLAN)} is missing or damaged; make a plan first") from None
    return content


def read_prediction(out: Path) -> tuple[TrainConfig, Prediction]:
    """Target and prediction. Raises ConfigError before `predict`."""
    target, prediction = read_plan(out)
    if not prediction:
        raise ConfigError(f"{out / PLAN} holds no prediction yet; finish the sweep and predict first")
    return target, prediction


def target_in(content: dict[str, Any], out: Path) -> TrainConfig:
    """The target run's settings in the content of the plan.json of `out`."""
    return from_json(json.dumps(content["target"]), out / PLAN)
