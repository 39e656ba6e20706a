"""A report on one sweep or table, section by section. What is missing is said, with the command that makes it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from speedrun_mup.plan import PLAN, Comparison, Prediction, compare, read_plan
from speedrun_mup.report.answer import Measured, answer, facts, rates
from speedrun_mup.report.checks import check_section
from speedrun_mup.report.contents import GREY, Mark, Report, Section, Table
from speedrun_mup.report.costs import cost_section
from speedrun_mup.report.figures import (
    best_losses,
    drift,
    interval_text,
    loss_curves,
    main_arm,
    signed,
    size_colors,
    training_curves,
)
from speedrun_mup.report.programs import cost_of_programs
from speedrun_mup.report.words import arm_words, larger_words, terms, verdict_words
from speedrun_mup.sweep import read_along, read_curves, read_definition, trainer_of
from speedrun_mup.transfer import Axes, TransferResult
from speedrun_mup.transfer.sources import is_sweep


def make_report(
    source: Path,
    result: TransferResult,
    checks: Sequence[Path] = (),
    target: Path | None = None,
    command: Sequence[str] = (),
    guide: str | None = None,
    predict: str = "",
) -> Report:
    """The report on a measurement.

    Args:
        source: What was measured: a sweep's folder or a table of runs.
        result: What came of it.
        checks: Files that `speedrun-mup coord-check` wrote.
        target: Folder of the finished run that the plan in `source` was made for.
        command: What asked for the report, to be printed in it.
        guide: Where docs/transfer.md lies as seen from the report's folder, if it is there.
        predict: The command that predicts a larger run from the same measurement.

    Raises:
        ConfigError: One of these is not what it should be.
        TransferError: There is nothing to draw.
    """
    main = main_arm(result).arm
    tested_first = sorted(result.arms.items(), key=lambda item: (item[0] != main, item[1].predicted is not None))
    result = replace(result, arms=dict(tested_first))
    swept = is_sweep(source)
    planned, prediction = read_plan(source) if (source / PLAN).exists() else (None, None)
    comparison = compare(source, target) if target else None
    axes = result.axes
    runs = read_along(source, axes.size) if swept else []
    own = swept and not trainer_of(read_definition(source))
    factors = own or (not swept and _is_of_sweep(source))
    sections = [
        Section("In numbers", tables=[_arms(result)]),
        Section(
            f"Loss against {axes.label}",
            figures=loss_curves(result, _axis_label(axes, factors), "loss (nats per token)" if factors else "loss"),
            tables=[_sizes(result)],
        ),
        _drift_section(result),
        _best(result, prediction, comparison, predict or _predict(source, result)),
    ]
    if swept:
        sections.append(
            Section("Training curves", _larger(result), [training_curves(result, read_curves(source, axes.size))])
        )
        sections.append(cost_section(result, runs, planned) if own else cost_of_programs(result, runs))
    else:
        why = f"{source.name} is a table of losses; `speedrun-mup sweep` keeps training curves and counts cost."
        sections += [Section("Training curves", [why]), Section("Cost", [why])]
    sections += [check_section(path, number) for number, path in enumerate(checks)]
    if not checks:
        make = "`speedrun-mup coord-check` makes one; give its coord-check.json with `--coord-check`."
        sections.append(Section("Coordinate check", [f"None was given. {make}"]))
    sections.append(_rules(result))
    seen = Measured(source, result, swept, factors, runs, planned, prediction, comparison, target)
    return Report(
        source.resolve().stem,
        result.verdict.value,
        (*result.reasons, *result.notes),
        sections,
        switches={"arm": list(result.arms), axes.size: [str(size) for size in size_colors(result)]},
        meaning=verdict_words(result),
        answer=answer(seen),
        rates=rates(seen),
        facts=facts(seen, command),
        terms=terms(axes, factors),
        guide=guide,
        controlled=any(arm.predicted is not None for arm in result.arms.values()),
    )


def _axis_label(axes: Axes, factors: bool) -> str:
    """Of the hyperparameter's axis. In a sweep a rate is a factor on what its settings say."""
    name = axes.hyperparameter
    factor = {"lr_scale": "factor on all", "lr": "factor"}.get(name, f"factor on {name}")
    return f"{axes.label} ({factor})" if factors and axes.is_rate else axes.label


def _is_of_sweep(table: Path) -> bool:
    """Whether `speedrun-mup sweep` wrote this table, of whatever version, so that its rates are factors."""
    if table.is_dir():  # logs of another program
        return False
    with open(table, encoding="utf-8", errors="replace") as file:
        return {"lr", "log2_lr", "train_loss", "flops"} <= set(file.readline(400).strip().split(","))


def _arms(result: TransferResult) -> Table:
    header = [
        "arm",
        "verdict",
        "drift, log2 per doubling",
        f"regret at the {result.axes.scale.largest}, nats",
        "sd of one run",
        f"{result.axes.scale.larger} has the lower loss",
    ]
    rows = []
    for name, arm in result.arms.items():
        verdict = arm.verdict.value
        if arm.predicted is not None:
            verdict = f"control, {signed(arm.predicted)} predicted: {verdict}" + ", as it must" * (verdict == "FAIL")
        sigma = "unknown" if arm.noise.sigma is None else f"{arm.noise.sigma:.4f}"
        larger = larger_words(arm.larger, result.thresholds.max_violations)
        rows.append([name, verdict, interval_text(arm.drift), interval_text(arm.regret, "{:.4f}"), sigma, larger])
    return Table(header, rows)


def _sizes(result: TransferResult) -> Table:
    axes = result.axes
    rate = "rate" if axes.is_rate else axes.hyperparameter
    header = [
        "arm",
        axes.size,
        "seeds",
        f"{axes.plain_values} tried",
        f"best log2 {rate}",
        f"best {rate}",
        "curvature",
        "loss",
        "largest stable",
        "remark",
    ]
    rows = []
    for name, arm in result.arms.items():
        for fit in arm.fits:
            error = "" if math.isnan(fit.optimum_se) else f" \N{PLUS-MINUS SIGN} {fit.optimum_se:.2f}"
            stable = "nothing" if math.isnan(fit.largest_stable) else f"{2**fit.largest_stable:.3g}"
            counts = [str(fit.size), str(len(fit.table.losses)), str(len(fit.table.log2_value))]
            best = [signed(fit.optimum) + error, f"{2**fit.optimum:.4g}", f"{fit.curvature:.4f}"]
            loss = interval_text(arm.best_loss(fit), "{:.4f}")
            remark = "; ".join(problem.removeprefix(f"{fit.place}: ") for problem in fit.problems)
            rows.append([name, *counts, *best, loss, stable, remark])
    return Table(header, rows)


def _drift_section(result: TransferResult) -> Section:
    title = f"Drift of the best {result.axes.label}"
    if any(arm.drift for arm in result.arms.values()):
        return Section(title, figures=[drift(result)])
    why = f"no arm has two {result.axes.plural} with an optimum inside the grid; extend the sweep."
    return Section(title, [f"Unknown: {why}"])


def _predict(source: Path, result: TransferResult) -> str:
    """The command that predicts from this table or sweep, as far as the result says how it was read."""
    axes, named = result.axes, list[str]()
    if not is_sweep(source):
        named += ["--size", axes.size] if axes.size != Axes().size else []
        named += ["--hyperparameter", axes.hyperparameter] if axes.hyperparameter != Axes().hyperparameter else []
    return shlex.join(["speedrun-mup", "transfer", str(source), *named, "--predict", axes.size.upper()])


def _best(
    result: TransferResult, prediction: Prediction | None, comparison: Comparison | None, predict: str
) -> Section:
    """Losses at the best rates; predicted against measured, as far as there is a plan."""
    if not prediction:
        axes = result.axes
        make = f"`{predict}` predicts loss and {axes.label} of a {axes.scale.larger} run."
        return Section(f"Loss at the best {axes.label}", [f"No prediction. {make}"], [best_losses(result)])
    low, high = prediction.loss_interval
    style: dict[str, Any] = {"symbol": "s", "size": 6, "hollow": True, "low": [low], "high": [high]}
    width = [prediction.width]
    marks = [Mark("points", width, [prediction.loss], GREY, "predicted", **style)]
    text = prediction.summary().splitlines()
    if comparison:
        marks.append(
            Mark("points", width, [comparison.measured], ("#c00000", "#ff6b6b"), "measured", symbol="D", size=6)
        )
        text += comparison.summary().splitlines()
    else:
        text.append("Not measured yet: train the target, then give its folder with `--target`.")
    return Section("Predicted against measured", text, [best_losses(result, marks)])


def _larger(result: TransferResult) -> list[str]:
    """Whether the curves lie in the order of the sizes, as sentences."""
    axes, most, told = result.axes, result.thresholds.max_violations, []
    for name, arm in result.arms.items():
        if arm.larger:
            question = f"is the {axes.scale.larger} model the better one?"
            told.append(f"{arm_words(name)}: {question} {larger_words(arm.larger, most)}.")
            if arm.larger.where:
                small, large, step = arm.larger.where
                worst = f"by {arm.larger.worst:.3f} nats" if math.isfinite(arm.larger.worst) else "without limit"
                told[-1] += f" The worst exception: {axes.at(large)} above {small} {worst} at step {step}."
    return told


def _rules(result: TransferResult) -> Section:
    """The thresholds of the verdict."""
    rules = [[name.replace("_", " "), f"{value:g}"] for name, value in asdict(result.thresholds).items()]
    text = (
        "A verdict counts if grid, controls and thresholds were fixed before the runs; a change afterwards is post hoc."
    )
    return Section("Rules of the verdict", [text], tables=[Table(["threshold", "value"], rules)])
