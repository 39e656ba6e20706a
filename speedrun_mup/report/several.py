"""The report on a plan over several sizes: a panel for each size, and the target's run beside what was predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from speedrun_mup.plan import (
    JointComparison,
    JointPlan,
    JointPrediction,
    compare_joint,
    joint_surface,
    read_joint_plan,
    read_joint_prediction,
)
from speedrun_mup.report.answer import code_of, dates_of, rate_table, target_facts
from speedrun_mup.report.checks import check_section
from speedrun_mup.report.contents import ARM_COLORS, GREY, Axis, Figure, Key, Mark, Panel, Report, Section, Table
from speedrun_mup.report.figures import interval_text, loss_curves
from speedrun_mup.report.words import terms
from speedrun_mup.sweep import RunResult, points_of, read_results
from speedrun_mup.sweep.result import in_bits_per_byte
from speedrun_mup.training.tracking import clock
from speedrun_mup.transfer import (
    Array,
    Axes,
    Estimate,
    Surface,
    SurfaceForecast,
    TransferError,
    Verdict,
    measure_transfer,
)
from speedrun_mup.transfer.axes import told_sizes
from speedrun_mup.transfer.points import along, slice_name
from speedrun_mup.transfer.thresholds import worst

PLACE, MEASURED = ARM_COLORS[0], ("#c00000", "#ff6b6b")
LINE = 9  # points of a line
MOST_TICKS = 7
LABEL = "learning rate (--lr-scale)"


@dataclass(frozen=True)
class Seen:
    """All that the report is about."""

    source: Path
    plan: JointPlan
    surface: Surface
    prediction: JointPrediction
    runs: Sequence[RunResult]
    comparison: JointComparison | None

    @property
    def judged(self) -> list[str]:
        """The sizes that a rule covers; all, where none does."""
        followed = self.prediction.followed
        return [name for name in self.plan.sizes if name not in followed] or list(self.plan.sizes)

    @property
    def verdict(self) -> Verdict:
        """The worst of these."""
        return worst(self.surface[name].verdict for name in self.judged)


def make_joint_report(
    source: Path,
    checks: Sequence[Path] = (),
    target: Path | None = None,
    command: Sequence[str] = (),
    guide: str | None = None,
) -> Report:
    """The report on the plan over several sizes in the folder `source`, whose prediction is made.

    Args:
        source: The folder.
        checks: Files that `speedrun-mup coord-check` wrote.
        target: Folder of the finished run that it was made for.
        command: What asked for the report, to be printed in it.
        guide: Where docs/transfer.md lies as seen from the report's folder, if it is there.

    Raises:
        ConfigError: One of these is not what it should be.
        TransferError: The runs bear no surface.
    """
    plan, _ = read_joint_plan(source)
    prediction = read_joint_prediction(source)
    comparison = compare_joint(source, target) if target else None
    surface = joint_surface(plan, source)
    seen = Seen(source, plan, surface, prediction, read_results(source), comparison)
    names = list(plan.sizes)
    sections = [
        Section(
            "Size by size", [_how_to_read(seen)], [_rates_by_size(seen), _losses_by_size(seen)], [_axes_table(seen)]
        ),
        _curves(seen),
        Section("The proxies", tables=[_places_table(seen)]),
        _cost(seen),
        *(check_section(path, number) for number, path in enumerate(checks)),
    ]
    reasons = [f"{name}: {surface[name].verdict}, {text}" for name in seen.judged for text in surface[name].reasons]
    words = {name: Axes(name).scale.meaning for name in names} | terms(Axes(names[0], "lr_scale"), True)
    return Report(
        source.resolve().stem,
        seen.verdict.value,
        reasons,
        sections,
        switches={name: [str(value) for value in sorted({place[name] for place in plan.places})] for name in names},
        meaning=_meaning(seen),
        answer=list(_answer(seen)),
        rates=rate_table(replace(plan.target, lr_scale=prediction.lr_scale), seen.runs[0].vocabulary),
        facts=[*_facts(seen), *target_facts(target, command)],
        terms={word: told for word, told in words.items() if told},
        guide=guide,
        controlled=False,
    )


def _answer(seen: Seen) -> Iterator[str]:
    told, bits = seen.prediction, in_bits_per_byte(seen.prediction.loss, seen.runs)
    (slow, fast), (low, high) = told.lr_scale_interval, told.loss_interval
    yield (
        f"At {told_sizes(told.sizes)} use `--lr-scale {told.lr_scale:.4g}` (90 % interval {slow:.4g} to {fast:.4g}): all "
        f"learning rates times {told.lr_scale:.4g}."
    )
    in_bytes = "" if bits is None else f", about {bits:.3f} bits per byte"
    yield f"Expect a validation loss of {told.loss:.4f} nats per token (90 % interval {low:.4f} to {high:.4f}){in_bytes}."
    if seen.comparison is None:
        yield "Measured: nothing yet. Train the target, then give its folder with `--target`."
        return
    yield f"Measured: {seen.comparison.measured:.4f}; {seen.comparison.miss}."
    if seen.comparison.rate:
        yield f"Note: {seen.comparison.rate}."


def _meaning(seen: Seen) -> str:
    """The verdict as a sentence; sizes without a rule are none of its business."""
    judged, followed = ", ".join(seen.judged), ", ".join(seen.prediction.followed)
    told = {
        Verdict.PASS: f"PASS: the best learning rate follows the rules in force over {judged}.",
        Verdict.FAIL: f"FAIL: the best learning rate does not follow the rules in force over {judged}.",
        Verdict.INCONCLUSIVE: f"INCONCLUSIVE: these runs do not show whether the rules in force hold over {judged}.",
    }[seen.verdict]
    if seen.prediction.followed and len(seen.judged) < len(seen.plan.sizes):
        told += f" No rule is in force for {followed}: there the rate is followed as it was measured."
    return told


def _how_to_read(seen: Seen) -> str:
    base = told_sizes(seen.surface.optima.base)
    return (
        f"A panel for each size, from the base ({base}) to the target, the other sizes being at the base: their effect, by "
        "the fit, is subtracted from what was measured."
    )


# ---- figures --------------------------------------------------------------------------------------------------------


def _rates_by_size(seen: Seen) -> Figure:
    unit = seen.plan.target.lr_scale
    panels = []
    for number, name in enumerate(seen.plan.sizes):
        optima = seen.surface.optima
        others = optima.doublings.copy()
        others[:, number] = 0.0
        moved = np.array([fit.optimum for fit in optima.fits]) - others @ [a.drift.value for a in seen.surface.drifts]
        error = 1.645 * np.array([fit.optimum_se for fit in optima.fits])
        along_it = [forecast.log2_value for forecast in _along(seen, name)]
        at, low, high = (unit * 2**edge for edge in (moved, moved - error, moved + error))
        marks = _marks(seen, name, at, low, high, _powers(unit, along_it))
        drift = seen.surface[name]
        judged = "no rule: followed" if name in seen.prediction.followed else drift.verdict.value
        panels.append(Panel(f"{name}: {judged}\ndrift {interval_text(drift.drift)}", marks))
    caption = (
        "Best learning rate against each size. Points: optima of the proxies with 90 % intervals. Line: what the forecast "
        "follows, shaded over its 90 % interval. Square: at the target's size. Above each panel the drift, in log2 per doubling."
    )
    return _figure(seen, "rate-by-size", caption, Axis(f"best {LABEL}", "log"), panels, compared=False)


def _losses_by_size(seen: Seen) -> Figure:
    law, optima = seen.surface.law, seen.surface.optima
    panels = []
    for number, name in enumerate(seen.plan.sizes):
        alone = np.zeros_like(optima.doublings)
        alone[:, number] = optima.doublings[:, number]
        moved = optima.best + (law.at(alone) - law.at(optima.doublings))[0]
        error = 1.645 * optima.error
        along_it = [forecast.loss for forecast in _along(seen, name)]
        marks = _marks(seen, name, moved, moved - error, moved + error, along_it)
        if seen.comparison:
            there = along_it[-1].value + seen.comparison.measured - seen.prediction.loss
            marks.append(Mark("points", [_reach(seen, name)], [there], MEASURED, "measured", symbol="D", size=6.0))
        panels.append(Panel(f"{name}\nexponent {interval_text(seen.surface[name].loss_exponent, '{:.2f}')}", marks))
    caption = (
        "Loss at the best learning rate against each size. Points: proxies, with 90 % of their noise. Line: the law, shaded "
        "over the 90 % interval of one run. Square: at the target's size."
    )
    if seen.comparison:
        caption += " Diamond: the target's run. It misses the line by as much in every panel: one run does not say why."
    return _figure(seen, "loss-by-size", caption, Axis("loss (nats per token)"), panels, compared=bool(seen.comparison))


def _sizes(seen: Seen, name: str) -> list[int]:
    """Sizes from the base to the target on one axis."""
    steps = np.linspace(0.0, math.log2(_reach(seen, name)), LINE)
    return sorted({round(seen.surface.optima.base[name] * 2**step) for step in steps})


def _along(seen: Seen, name: str) -> list[SurfaceForecast]:
    """Forecasts from the base to the target's size on one axis, the others at the base."""
    return [seen.surface.predict(seen.surface.optima.base | {name: size}) for size in _sizes(seen, name)]


def _reach(seen: Seen, name: str) -> float:
    return seen.plan.sizes[name] / seen.surface.optima.base[name]


def _powers(unit: float, estimates: Sequence[Estimate]) -> list[Estimate]:
    return [Estimate(unit * 2**estimate.draws) for estimate in estimates]


def _marks(seen: Seen, name: str, at: Array, low: Array, high: Array, line: Sequence[Estimate]) -> list[Mark]:
    """Proxies, the line through them to the target's size with its band, and the square at its end."""
    optima = seen.surface.optima
    number = list(optima.base).index(name)
    x = 2.0 ** optima.doublings[:, number]
    notes = [told_sizes(dict(zip(optima.base, place, strict=True))) for place in optima.places]
    ends = np.array(_sizes(seen, name)) / optima.base[name]
    edges = np.array([estimate.interval() for estimate in line])
    marks = [Mark("line", ends, [estimate.value for estimate in line], PLACE, size=1.2)]
    bars: dict[str, Any] = {}
    if np.isfinite(edges).all():
        marks.insert(0, Mark("band", ends, color=PLACE, opacity=0.15, low=edges[:, 0], high=edges[:, 1]))
        bars = {"low": edges[-1:, 0], "high": edges[-1:, 1]}
    errors: dict[str, Any] = {"low": low, "high": high} if np.isfinite(low).all() else {}
    marks.append(Mark("points", x, at, PLACE, "proxy", notes=notes, size=5.0, **errors))
    marks.append(
        Mark("points", ends[-1:], [line[-1].value], GREY, "predicted", symbol="s", hollow=True, size=6.0, **bars)
    )
    return marks


def _figure(seen: Seen, name: str, caption: str, y: Axis, panels: Sequence[Panel], compared: bool) -> Figure:
    most = max(_reach(seen, axis) for axis in seen.plan.sizes)
    powers = [2.0**power for power in range(math.ceil(math.log2(most)) + 1)]
    ticks = powers if len(powers) <= MOST_TICKS else []
    keys = [
        Key("proxies", "points", PLACE),
        Key("fit", "line", PLACE),
        Key("predicted at the target's size", "points", GREY, "s", hollow=True),
    ]
    if compared:
        keys.append(Key("measured", "points", MEASURED, "D"))
    return Figure(name, caption, Axis("size / base", "log2", ticks=ticks), y, panels, keys, size=(2.6, 2.5))


def _curves(seen: Seen) -> Section:
    """Loss against learning rate along each size, at the base of the others."""
    names, base = list(seen.plan.sizes), seen.surface.optima.base
    points, figures, text = points_of(seen.runs), [], []
    for name in names:
        others = {other: value for other, value in base.items() if other != name}
        mine = [
            point for point in along(points, name, names) if point.arm == slice_name(seen.surface.optima.arm, others)
        ]
        mine = [replace(point, arm=seen.surface.optima.arm) for point in mine]
        if len({point.sizes[name] for point in mine}) > 1:
            try:
                result = measure_transfer(mine, axes=Axes(name, "lr_scale"))
                (figure, *_) = loss_curves(result, LABEL, "loss (nats per token)")
            except TransferError as fault:
                text.append(f"{name}: {fault}")
                continue
            panels = [
                replace(panel, title=f"{name}; {told_sizes(others)}" if others else name) for panel in figure.panels
            ]
            figures.append(replace(figure, name=f"{figure.name}-{name}", panels=panels))
    return Section("Loss against learning rate", text, figures)


# ---- tables ---------------------------------------------------------------------------------------------------------


def _axes_table(seen: Seen) -> Table:
    header = [
        *("size", "proxies", "target", "doublings beyond the proxies", "drift, log2 per doubling", "rule"),
        *("exponent of the loss", "what it does to the loss, base to target"),
    ]
    rows = []
    for axis in seen.surface.drifts:
        name, followed = axis.name, axis.name in seen.prediction.followed
        alone = np.array([[math.log2(_reach(seen, name)) if other == name else 0.0 for other in seen.plan.sizes]])
        law = seen.surface.law
        effect = Estimate((law.at(alone) - law.at(np.zeros_like(alone)))[:, 0])
        judged = "none: followed" if followed else axis.verdict.value
        sizes = [", ".join(map(str, axis.values)), str(seen.plan.sizes[name]), f"{seen.prediction.outside[name]:.2g}"]
        numbers = [interval_text(axis.loss_exponent, "{:.2f}"), interval_text(effect, "{:+.3f}")]
        rows.append([name, *sizes, interval_text(axis.drift), judged, *numbers])
    return Table(header, rows)


def _places_table(seen: Seen) -> Table:
    optima, unit = seen.surface.optima, seen.plan.target.lr_scale
    rows = []
    for place, fit, error in zip(optima.places, optima.fits, optima.error, strict=True):
        bounds = [unit * 2 ** (fit.optimum + sign * 1.645 * fit.optimum_se) for sign in (-1, 1)]
        best = f"{unit * 2**fit.optimum:.3g} [{bounds[0]:.3g}, {bounds[1]:.3g}]"
        loss = f"{fit.best_losses[0]:.4f} \N{PLUS-MINUS SIGN} {1.645 * error:.4f}"
        counts = [str(len(fit.table.losses)), str(len(fit.table.log2_value))]
        rows.append([*map(str, place), *counts, best, loss])
    header = [*optima.base, "seeds", "rates tried", f"best {LABEL}, 90 %", "loss at it, 90 %"]
    return Table(header, rows)


def _cost(seen: Seen) -> Section:
    flops, seconds = sum(run.flops for run in seen.runs), sum(run.seconds for run in seen.runs)
    text = (
        f"The {len(seen.runs)} runs of the proxies took {flops:.3g} FLOPs, {flops / seen.plan.target_flops:.1%} of the "
        f"target run's {seen.plan.target_flops:.3g}, and {clock(seconds)} of one worker's time."
    )
    return Section("Cost", [text])


def _facts(seen: Seen) -> Iterator[tuple[str, str]]:
    cfg, plan = seen.plan.target, seen.plan
    yield (
        "Target",
        f"{told_sizes(plan.sizes)}; {cfg.n_layer} layers, heads of {cfg.head_dim}; {cfg.schedule.describe()}",
    )
    yield "Arm", f"{seen.surface.optima.arm}; base width {cfg.tuned_width}"
    if plan.priors:
        told = [
            f"{kind} of {name} {mean:.3g} \N{PLUS-MINUS SIGN} {sd:.2g}"
            for kind, some in plan.priors.items()
            for name, (mean, sd) in some.items()
        ]
        yield "Known before", ", ".join(told)
    yield "Data", f"{cfg.data}; fingerprint {', '.join(sorted({run.corpus[:12] for run in seen.runs}))}"
    yield "Runs", f"{len(seen.runs)}; {sum(run.diverged for run in seen.runs)} diverged"
    yield "Trained", dates_of(seen.source, seen.runs)
    yield "Code", code_of(seen.runs)
