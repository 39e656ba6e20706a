"""The figures of a transfer measurement, from what `measure_transfer` and the sweep's folder hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from speedrun_mup.report.contents import ARM_COLORS, Axis, Choice, Color, Figure, Key, Mark, Panel
from speedrun_mup.report.runs import smooth
from speedrun_mup.report.words import arm_words
from speedrun_mup.transfer import (
    ArmResult,
    Array,
    CurveKey,
    Estimate,
    SizeFit,
    TransferError,
    TransferResult,
    with_article,
)

SYMBOLS = ("o", "s", "^", "v")
MOST_STEPS = 120  # points of a training curve; longer ones are averaged over neighbouring steps
ASIDE, ASIDE_ALL = 0.06, 0.4  # log2: between two arms, and between the first and the last
BAND: Color = ("#dcdcdc", "#3a3a3a")


def loss_curves(result: TransferResult, label: str | None = None, loss: str = "loss") -> list[Figure]:
    """Loss against the hyperparameter: a line per size, a panel per arm, the same axes.

    First the two panels that a reader compares: what is known not to transfer, and the arm under test. Any others follow
    in a second figure. label, loss: of the axes. Raises TransferError.
    """
    drawn = {name: arm for name, arm in result.arms.items() if arm.fits}
    if not drawn:
        raise TransferError(f"no {result.axes.size} has enough stable points for a picture; extend the sweep")
    pair = _pair(result)
    rest = [name for name in drawn if name not in pair]
    both = (("loss-curves", [name for name in pair if name in drawn]), ("loss-curves-others", rest))
    return [
        _loss_curves(name, [drawn[arm] for arm in arms], result, label or result.axes.label, loss)
        for name, arms in both
        if arms
    ]


def main_arm(result: TransferResult) -> ArmResult:
    """The arm that a report is about: the one called mup, else the first that is no control."""
    tested = [arm for arm in result.arms.values() if arm.predicted is None] or list(result.arms.values())
    return next((arm for arm in tested if arm.arm == "mup"), tested[0])


def _pair(result: TransferResult) -> list[str]:
    """What to hold against the main arm, if there is anything, and the main arm."""
    main = main_arm(result).arm
    others = sorted((arm for arm in result.arms.values() if arm.arm != main), key=lambda arm: arm.predicted is None)
    return [*(arm.arm for arm in others[:1]), main]


def _loss_curves(name: str, arms: Sequence[ArmResult], result: TransferResult, label: str, loss: str) -> Figure:
    """Marks of a size: its seeds, the line through their means, the quadratic fit, its optimum, what diverged."""
    colors, axes = size_colors(result), result.axes
    ranks = {size: rank for rank, size in enumerate(reversed(colors))}
    symbols = dict(zip(colors, cycle(SYMBOLS)))
    panels = []
    for arm in arms:
        tags = {"arm": arm.arm}
        marks = [
            mark for fit in arm.fits for mark in _curve(arm, fit, colors[fit.size], symbols[fit.size], ranks[fit.size])
        ]
        marks += [
            Mark("rule", [2**fit.optimum], size=1, tags=tags, dotted=True)
            for fit in arm.usable
            if fit.size == arm.base_size
        ]
        panels.append(Panel(f"{arm_words(arm.arm)}\n{_movement(arm)}", marks, tags))
    here = {fit.size for arm in arms for fit in arm.fits}
    keys = [Key(axes.at(size), "line", colors[size], symbols[size], marked=True) for size in sorted(here)]
    keys.append(Key("quadratic fit to its points", "band", BAND))
    keys.append(Key(f"best of {with_article(axes.size)}, by the fit", "points", symbol="D"))
    if any(fit.problems for arm in arms for fit in arm.fits):
        keys.append(Key("does not count", "points", symbol="D", hollow=True))
    if any(mark.kind == "rule" for panel in panels for mark in panel.marks):
        keys.append(Key(f"best of the base {axes.size}", "line", dotted=True))
    if any(fit.table.diverged for arm in arms for fit in arm.fits):
        keys.append(Key("diverged", "cross"))
    caption = (
        f"Loss against {axes.label}, a line per {axes.size}, means over seeds (faint dots: single seeds). Diamonds: the best "
        f"{axes.label} of {with_article(axes.size)}, from the fit behind its line, at the loss of the table below, from "
        "a narrower fit that keeps closer to the points; hollow where it does not count. "
        f"Dotted: the best of the base {axes.size}. If {axes.plain_values} transfer, the diamonds stand above one another."
    )
    if name == "loss-curves-others":
        caption = "The other arms, drawn in the same way."
    limits = _loss_limits([fit for arm in arms for fit in arm.fits])
    y = Axis(loss, limits=limits)
    return Figure(name, caption, Axis(label, "log2"), y, panels, keys, size=(3.3, 2.7))


def _movement(arm: ArmResult) -> str:
    if arm.drift is None:
        return f"how the best {arm.axes.label} moves is not known"
    slope = arm.drift.value
    return f"best per doubling of {arm.axes.size}: \N{MULTIPLICATION SIGN}{2**slope:.2f} ({signed(slope)} in log2)"


def size_colors(result: TransferResult) -> dict[int, Color]:
    """Light to dark as models get larger (on dark ground the other way round), ascending sizes."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    sizes = sorted({fit.size for arm in result.arms.values() for fit in arm.fits})
    places = np.linspace(0, 1, len(sizes))
    viridis = colormaps["viridis"]
    return {
        size: (to_hex(viridis(0.86 - 0.8 * at)), to_hex(viridis(0.4 + 0.55 * at))) for size, at in zip(sizes, places)
    }


def arm_colors(result: TransferResult) -> dict[str, Color]:
    """A colour per arm."""
    return dict(zip(result.arms, cycle(ARM_COLORS)))


def _curve(arm: ArmResult, fit: SizeFit, color: Color, symbol: str, rank: int) -> list[Mark]:
    """One size in one panel."""
    table, fitted = fit.table, fit.quadratic
    tags = {"arm": arm.arm, arm.axes.size: str(fit.size)}
    name = f"{arm_words(arm.arm)}, {fit.place}"
    value = 2**table.log2_value
    seed, column = np.nonzero(np.isfinite(table.losses))
    near = np.linspace(fitted.left[0], fitted.right[0], 61)
    curve = fitted.a[0] + (near - fitted.center[0]) * (fitted.b[0] + (near - fitted.center[0]) * fitted.c[0])
    notes = [f"curvature {fit.curvature:.4f} nats per log2 squared", *fit.problems]
    if not math.isnan(fit.optimum_se):
        notes.append(f"known to \N{PLUS-MINUS SIGN} {fit.optimum_se:.2f} (log2)")
    note = "; ".join(notes)
    best: dict[str, Any] = {"symbol": "D", "size": 7, "hollow": bool(fit.problems), "notes": [note]}
    faint: dict[str, Any] = {"size": 1.6, "opacity": 0.35}
    means: dict[str, Any] = {"size": 1.2, "marked": True, "symbol": symbol}
    return [
        Mark("points", value[column], table.losses[seed, column], color, f"{name}, one seed", tags, **faint),
        Mark("line", 2**near, curve, color, tags=tags, size=3.6, opacity=0.22),
        Mark("line", value, table.mean, color, f"{name}, mean over seeds", tags, **means),
        Mark("points", [2**fit.optimum], fit.best_losses[:1], color, f"{name}: best {arm.axes.label}", tags, **best),
        Mark("cross", [2**x for x in table.diverged], [rank] * len(table.diverged), color, tags=tags),
    ]


def _loss_limits(fits: Sequence[SizeFit]) -> tuple[float, float]:
    """Limits that show every quadratic fit whole, with room for crosses above; cliffs leave through the top."""
    lowest = min(float(fit.table.mean.min()) for fit in fits)
    shown = [
        (fit.table.log2_value >= fit.quadratic.left[0]) & (fit.table.log2_value <= fit.quadratic.right[0])
        for fit in fits
    ]
    highest = max(float(fit.table.mean[near].max()) for fit, near in zip(fits, shown))
    height = highest - lowest
    return lowest - 0.08 * height, highest + (0.3 if any(fit.table.diverged for fit in fits) else 0.1) * height


def interval_text(estimate: Estimate | None, form: str = "{:+.2f}") -> str:
    """A number for a reader: its value and, if known, its 90 % interval."""
    if estimate is None:
        return "unknown"
    low, high = estimate.interval()
    text = _with_minus(estimate.value, form)
    return text if math.isnan(low) else f"{text} [{_with_minus(low, form)}, {_with_minus(high, form)}]"


def signed(value: float) -> str:
    """With its sign and two digits."""
    return _with_minus(value, "{:+.2f}")


def _with_minus(value: float, form: str) -> str:
    """With a real minus sign, and none before a zero."""
    text = form.format(value)
    return form.format(0.0) if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def drift(result: TransferResult) -> Figure:
    """Optimum against size, a panel per arm, shifted so that its fitted line starts at 0 at its base size.

    Bars: 90 % of a normal error. Lines: the fitted drift, shaded over its 90 % interval. Grey: drifts that count as
    transfer. A hollow mark is an optimum that does not enter the line. Raises TransferError.
    """
    drifts = {name: (arm, arm.drift) for name, arm in result.arms.items() if arm.drift is not None}
    if not drifts:
        raise TransferError(f"no arm has a drift to draw; each needs two {result.axes.plural} with an optimum")
    sizes = sorted({fit.size for arm, _ in drifts.values() for fit in arm.fits})
    ends = np.log2([sizes[0], sizes[-1]]) + np.array([-0.15, 0.15])
    limit, colors, axes = result.thresholds.equivalence, arm_colors(result), result.axes
    panels = []
    for name, (arm, slope) in drifts.items():
        x = np.sort([*ends, math.log2(arm.base_size)]) - math.log2(arm.base_size)
        zone: dict[str, Any] = {
            "low": -limit * np.abs(x),
            "high": limit * np.abs(x),
            "color": BAND,
            "tags": {"arm": name},
        }
        marks = [Mark("band", arm.base_size * 2**x, **zone), *_drift_marks(arm, slope, colors[name], ends)]
        panels.append(Panel(f"{_title(arm)}\n{interval_text(slope)}", marks, {"arm": name}))
    keys = [Key(f"no drift: within \N{PLUS-MINUS SIGN}{limit:g} in log2 per doubling", "band", BAND)]
    keys += [
        Key(f"best of {with_article(axes.size)}, with its 90 % error", "points"),
        Key("fitted drift, shaded over its 90 % interval", "line"),
    ]
    if any(fit.problems for arm, _ in drifts.values() for fit in arm.fits):
        keys.append(Key("does not count", "points", hollow=True))
    caption = (
        f"How far the best {axes.label} moves with {axes.size}, counted from the fitted line at the base {axes.size}. Above "
        f"each panel the drift, in log2 per doubling of {axes.size}, with its 90 % interval; a line inside the grey zone "
        "passes as transfer."
    )
    y = Axis(f"shift of the best {axes.label} (log2)")
    return Figure("drift", caption, Axis(axes.size, "log2", ticks=sizes), y, panels, keys, size=(2.6, 2.5))


def _title(arm: ArmResult) -> str:
    return arm_words(arm.arm) if arm.predicted is None else f"{arm_words(arm.arm)}, control"


def _drift_marks(arm: ArmResult, slope: Estimate, color: Color, ends: Array) -> list[Mark]:
    """One arm's optima, line and interval; `ends` (2,) are the limits in log2 size."""
    start, tags = math.log2(arm.base_size), {"arm": arm.arm}
    doublings = np.log2([fit.size for fit in arm.usable]) - start
    rest = [fit.optimum - slope.value * j for fit, j in zip(arm.usable, doublings)]
    zero = np.average(rest, weights=[fit.weight for fit in arm.usable])
    x = np.sort([*ends, start]) - start
    low, high = slope.interval()
    marks = [Mark("line", 2 ** (start + x), slope.value * x, color, tags=tags, size=1.1)]
    if not math.isnan(low):
        edges: dict[str, Any] = {"low": np.minimum(low * x, high * x), "high": np.maximum(low * x, high * x)}
        marks.append(Mark("band", 2 ** (start + x), color=color, tags=tags, opacity=0.15, **edges))
    for fit in arm.fits:
        at, bar = fit.optimum - zero, 1.645 * float(np.nan_to_num(fit.optimum_se))
        notes = ["; ".join([f"best {arm.axes.label} 2^{fit.optimum:.2f}", *fit.problems])]
        tag = tags | {arm.axes.size: str(fit.size)}
        style: dict[str, Any] = {"size": 4.5, "hollow": bool(fit.problems)}
        style |= {"low": [at - bar], "high": [at + bar], "notes": notes}
        marks.append(Mark("points", [fit.size], [at], color, arm_words(arm.arm), tag, **style))
    return marks


def best_losses(result: TransferResult, promised: Sequence[Mark] = ()) -> Figure:
    """Loss at the best value of each size, with 90 % intervals: a parametrization can transfer and still lose.

    promised: points for a target run, such as what was predicted and what was measured.
    """
    marks: list[Mark] = []
    colors = arm_colors(result)
    symbols = dict(zip(result.arms, cycle(SYMBOLS)))
    apart = min(ASIDE, ASIDE_ALL / len(result.arms))
    for place, (name, arm) in enumerate(result.arms.items()):
        aside = 2 ** (apart * (place - (len(result.arms) - 1) / 2))  # so that arms that agree do not hide one another
        tags = {"arm": name}
        losses = [arm.best_loss(fit) for fit in arm.usable]
        sizes, values = [fit.size * aside for fit in arm.usable], [loss.value for loss in losses]
        marks.append(Mark("line", sizes, values, colors[name], tags=tags, size=1.1))
        for fit, size, loss in zip(arm.usable, sizes, losses):
            low, high = loss.interval()
            bar: dict[str, Any] = {"symbol": symbols[name], "size": 5.0}
            if not math.isnan(low):
                bar |= {"low": [low], "high": [high]}
            tag = tags | {arm.axes.size: str(fit.size)}
            marks.append(Mark("points", [size], [loss.value], colors[name], arm_words(name), tag, **bar))
    keys = [Key(_title(arm), "line", colors[name], symbols[name], marked=True) for name, arm in result.arms.items()]
    ticks = {float(fit.size) for arm in result.arms.values() for fit in arm.fits}
    best = f"loss at the best {result.axes.label}"
    caption = (
        f"{best.capitalize()} of each {result.axes.size}, with 90 % intervals; arms stand a little aside where they would "
        "overlap."
    )
    marks += promised
    keys += [Key(mark.name, mark.kind, mark.color, mark.symbol, hollow=mark.hollow) for mark in promised]
    ticks |= {size for mark in promised for size in mark.x}
    x, y = Axis(result.axes.size, "log2", ticks=sorted(ticks)), Axis(f"{best} (nats)")
    return Figure("best-loss", caption, x, y, [Panel("", marks)], keys, size=(4.4, 2.8))


def training_curves(result: TransferResult, curves: Mapping[CurveKey, Array]) -> Figure:
    """Training loss against step, a panel per arm and a colour per size, mean over seeds; the reader picks the value.

    First shown is the value at which "larger is better" was judged, else that nearest to the base size's optimum.
    """
    colors, axes = size_colors(result), result.axes
    tables: dict[tuple[str, int, float], list[Array]] = {}
    for (owner, size, value, _), curve in sorted(curves.items()):
        tables.setdefault((owner, size, round(math.log2(value), 6)), []).append(curve)
    values = sorted({at for _, _, at in tables})
    own = f"nearest to the best of the base {axes.size}"
    panels, shown, judged = [], [], []
    for name, arm in result.arms.items():
        chosen = _judged_value(arm, [at for owner, _, at in tables if owner == name])
        marks = []
        for (owner, size, at), some in tables.items():
            if owner != name or size not in colors:
                continue
            steps, loss = _thin(np.mean(some, axis=0))
            loss = np.array(smooth(loss))
            label = f"{arm_words(name)}, {axes.at(size)}, {axes.label} {2**at:.3g}"
            tags = {"arm": name, axes.size: str(size), "rate": f"{2**at:.3g}"}
            marks.append(Mark("line", steps, loss, colors[size], label, tags, size=1.1))
            if at == chosen:
                marks.append(Mark("line", steps, loss, colors[size], label, tags | {"rate": own}, size=1.1))
                shown.append((steps, loss))
        panels.append(Panel(_title(arm), marks, {"arm": name}))
        judged.append(f"{name} {2**chosen:.3g}")
    late = np.concatenate([loss[steps >= 0.1 * steps[-1]] for steps, loss in shown])
    room = 0.05 * float(late.max() - late.min())
    limits = (float(late.min()) - room, float(late.max()) + room)
    keys = [Key(axes.at(size), "line", color) for size, color in colors.items()]
    caption = (
        "Training loss, mean over seeds and smoothed over an eighth of the steps so far to either side, since all "
        f"{axes.plural} share the ups and downs of their batches; at one {axes.label} for all of them: that nearest to "
        f"the best of the base {axes.size} ({', '.join(judged)})."
        + f" With the right rules a {axes.scale.larger} model is better at every step."
        * axes.scale.of_model
    )
    choice = Choice("rate", axes.label, [own, *(f"{2**at:.3g}" for at in values)])
    return Figure(
        "training-curves", caption, Axis("step"), Axis("training loss (nats)", limits=limits), panels, keys, choice
    )


def _judged_value(arm: ArmResult, values: Sequence[float]) -> float:
    if arm.larger:
        return arm.larger.log2_value
    optimum = arm.fits[0].optimum if arm.fits else 0.0
    return min(values, key=lambda at: abs(at - optimum))


def _thin(curve: Array) -> tuple[Array, Array]:
    """Steps and losses of a curve (T, 2) up to where it diverges, averaged to MOST_STEPS points or fewer."""
    curve = curve[: int(np.isfinite(curve[:, 1]).cumprod().sum())]
    block = max(1, math.ceil(len(curve) / MOST_STEPS))
    means = [curve[at : at + block].mean(axis=0) for at in range(0, len(curve), block)]
    steps, losses = np.array(means).reshape(-1, 2).T
    return steps, losses
