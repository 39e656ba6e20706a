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
    lr_curves,
    main_arm,
    signed,
    training_curves,
    width_colors,
)
from speedrun_mup.report.words import TERMS, TERMS_OF_TABLE, arm_words, verdict_words, wider_words
from speedrun_mup.sweep import read_results
from speedrun_mup.sweep import training_curves as read_curves
from speedrun_mup.transfer import TransferResult, is_rate, knob_name
from speedrun_mup.transfer.runs import LR


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
        command: What asked for the report, to be told in it.
        guide: Where docs/transfer.md lies as seen from the report's folder, if it is there.
        predict: The command that predicts a wider run from the same measurement.

    Raises:
        ConfigError: One of these is not what it should be.
        TransferError: There is nothing to draw.
    """
    main = main_arm(result).arm
    tested_first = sorted(result.arms.items(), key=lambda item: (item[0] != main, item[1].predicted is not None))
    result = replace(result, arms=dict(tested_first))
    swept = source.is_dir()
    planned, prediction = read_plan(source) if (source / PLAN).exists() else (None, None)
    comparison = compare(source, target) if target else None
    cells = read_results(source) if swept else []
    knob = knob_name(result.knob)
    factors = swept or _is_of_sweep(source)
    sections = [
        Section("In numbers", tables=[_arms(result)]),
        Section(
            f"Loss against {knob}",
            figures=lr_curves(result, _knob_label(result, factors), "loss (nats per token)" if factors else "loss"),
            tables=[_widths(result)],
        ),
        _drift(result),
        _best(result, prediction, comparison, predict or _predict(source, result)),
    ]
    if swept:
        sections.append(Section("Training curves", _wider(result), [training_curves(result, read_curves(source))]))
        sections.append(cost_section(result, cells, source, planned))
    else:
        why = f"{source.name} is a table of losses; `speedrun-mup sweep` keeps training curves and counts cost."
        sections += [Section("Training curves", [why]), Section("Cost", [why])]
    sections += [check_section(path, number) for number, path in enumerate(checks)]
    if not checks:
        make = "`speedrun-mup coord-check` makes one; give its coord-check.json with `--coord-check`."
        sections.append(Section("Coordinate check", [f"None was given. {make}"]))
    sections.append(_rules(result))
    seen = Measured(source, result, swept, factors, cells, planned, prediction, comparison, target)
    return Report(
        source.resolve().stem,
        result.verdict.value,
        (*result.reasons, *result.notes),
        sections,
        switches={"arm": list(result.arms), "width": [str(width) for width in width_colors(result)]},
        meaning=verdict_words(result),
        answer=answer(seen),
        rates=rates(seen),
        facts=facts(seen, command),
        terms=TERMS if factors else TERMS_OF_TABLE,
        guide=guide,
        controlled=any(arm.predicted is not None for arm in result.arms.values()),
    )


def _knob_label(result: TransferResult, swept: bool) -> str:
    """Of the knob's axis. In a sweep it is a factor on what its settings say."""
    name = knob_name(result.knob)
    factor = {"lr_scale": "factor on all", "lr": "factor"}.get(result.knob, f"factor on {result.knob}")
    return f"{name} ({factor})" if swept and is_rate(result.knob) else name


def _is_of_sweep(table: Path) -> bool:
    """Whether `speedrun-mup sweep` wrote this table, of whatever version, so that its rates are factors."""
    with open(table, encoding="utf-8", errors="replace") as file:
        return {"lr", "log2_lr", "train_loss", "flops"} <= set(file.readline(400).strip().split(","))


def _arms(result: TransferResult) -> Table:
    header = [
        "arm",
        "verdict",
        "drift, octaves per doubling",
        "regret at the widest, nats",
        "sd of one run",
        "wider has the lower loss",
    ]
    rows = []
    for name, arm in result.arms.items():
        verdict = arm.verdict.value
        if arm.predicted is not None:
            verdict = f"control, {signed(arm.predicted)} predicted: {verdict}" + ", as it must" * (verdict == "FAIL")
        sigma = "unknown" if arm.noise.sigma is None else f"{arm.noise.sigma:.4f}"
        wider = wider_words(arm.wider, result.thresholds.max_violations)
        rows.append([name, verdict, interval_text(arm.drift), interval_text(arm.regret, "{:.4f}"), sigma, wider])
    return Table(header, rows)


def _widths(result: TransferResult) -> Table:
    rate = "rate" if is_rate(result.knob) else result.knob
    header = [
        "arm",
        "width",
        "seeds",
        "rates tried" if is_rate(result.knob) else "values tried",
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
            counts = [str(fit.width), str(len(fit.cells.losses)), str(len(fit.cells.log2_lr))]
            best = [signed(fit.optimum) + error, f"{2**fit.optimum:.4g}", f"{fit.curvature:.4f}"]
            loss = interval_text(arm.best_loss(fit), "{:.4f}")
            remark = "; ".join(problem.removeprefix(f"width {fit.width}: ") for problem in fit.problems)
            rows.append([name, *counts, *best, loss, stable, remark])
    return Table(header, rows)


def _drift(result: TransferResult) -> Section:
    title = f"Drift of the best {knob_name(result.knob)}"
    if any(arm.drift for arm in result.arms.values()):
        return Section(title, figures=[drift(result)])
    return Section(title, ["Unknown: no arm has two widths with an optimum inside the grid; extend the sweep."])


def _predict(source: Path, result: TransferResult) -> str:
    """The command that predicts from this table or sweep, as far as the result tells how it was read."""
    knob = [] if source.is_dir() or result.knob == LR else ["--knob", result.knob]
    return shlex.join(["speedrun-mup", "transfer", str(source), *knob, "--predict", "WIDTH"])


def _best(
    result: TransferResult, prediction: Prediction | None, comparison: Comparison | None, predict: str
) -> Section:
    """Losses at the best rates; predicted against measured, as far as there is a plan."""
    if not prediction:
        knob = knob_name(result.knob)
        make = f"`{predict}` predicts loss and {knob} of a wider run."
        return Section(f"Loss at the best {knob}", [f"Without prediction. {make}"], [best_losses(result)])
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


def _wider(result: TransferResult) -> list[str]:
    """Whether the curves lie in the order of the widths, in words."""
    most, told = result.thresholds.max_violations, []
    for name, arm in result.arms.items():
        if arm.wider:
            told.append(f"{arm_words(name)}: is the wider model the better one? {wider_words(arm.wider, most)}.")
            if arm.wider.where:
                narrow, wide, step = arm.wider.where
                worst = f"by {arm.wider.largest:.3f} nats" if math.isfinite(arm.wider.largest) else "without limit"
                told[-1] += f" The worst exception: width {wide} above {narrow} {worst} at step {step}."
    return told


def _rules(result: TransferResult) -> Section:
    """The thresholds of the verdict."""
    rules = [[name.replace("_", " "), f"{value:g}"] for name, value in asdict(result.thresholds).items()]
    text = (
        "A verdict counts if grid, controls and thresholds were fixed before the runs; a change afterwards is post hoc."
    )
    return Section("Rules of the verdict", [text], tables=[Table(["threshold", "value"], rules)])
