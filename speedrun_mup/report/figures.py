"""The figures of a transfer measurement, from what `measure_transfer` and the sweep's folder hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from speedrun_mup.report.contents import ARM_COLORS, Axis, Choice, Color, Figure, Key, Mark, Panel
from speedrun_mup.transfer import (
    ArmResult,
    Array,
    CurveKey,
    Estimate,
    TransferError,
    TransferResult,
    WidthFit,
    knob_name,
)

MOST_STEPS = 120  # points of a training curve; longer ones are averaged over neighbouring steps
BAND: Color = ("#dcdcdc", "#3a3a3a")


def lr_curves(result: TransferResult, label: str = "learning rate") -> Figure:
    """Loss against learning rate, or what was turned, a panel per arm and a colour per width.

    Thin lines join the means over seeds (dots: seeds); the thick line is the parabola over its window, the diamond its
    optimum (hollow if the width is not usable); the dotted rule is the base width's optimum. Raises TransferError.
    """
    fits = [fit for arm in result.arms.values() for fit in arm.fits]
    if not fits:
        raise TransferError("no width has enough stable points for a picture; extend the sweep")
    colors = width_colors(result)
    ranks = {width: rank for rank, width in enumerate(reversed(colors))}
    panels = []
    for arm in result.arms.values():
        marks = [mark for fit in arm.fits for mark in _curve(arm, fit, colors[fit.width], ranks[fit.width])]
        marks += [
            Mark("rule", [2**fit.optimum], size=1, tags={"arm": arm.arm}, dotted=True)
            for fit in arm.usable
            if fit.width == arm.base_width
        ]
        panels.append(Panel(f"{_title(arm)}\ndrift {interval_text(arm.drift)}", marks, {"arm": arm.arm}))
    keys = [Key(f"width {width}", "line", color) for width, color in colors.items()]
    keys += [
        Key("optimum at base", "line", dotted=True),
        Key("optimum", "points", symbol="D"),
        Key("one seed", "points"),
    ]
    if any(fit.cells.diverged for fit in fits):
        keys.append(Key("diverged", "cross"))
    caption = (
        f"Loss against {knob_name(result.knob)}. Thin lines: means over seeds. Thick lines: the fitted parabolas in "
        "their windows, with the optimum (diamond; hollow where it does not count). Dotted: the optimum of the base "
        "width. Drift in octaves per doubling of width, with its 90 % interval."
    )
    limits = _loss_limits(fits)
    return Figure("lr-curves", caption, Axis(label, "log2"), Axis("loss", limits=limits), panels, keys)


def _title(arm: ArmResult) -> str:
    return arm.arm if arm.predicted is None else f"{arm.arm} (control)"


def width_colors(result: TransferResult) -> dict[int, Color]:
    """Light to dark as models get wider (on dark ground the other way round), ascending widths."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    widths = sorted({fit.width for arm in result.arms.values() for fit in arm.fits})
    places = np.linspace(0, 1, len(widths))
    viridis = colormaps["viridis"]
    return {
        width: (to_hex(viridis(0.86 - 0.8 * at)), to_hex(viridis(0.4 + 0.55 * at))) for width, at in zip(widths, places)
    }


def arm_colors(result: TransferResult) -> dict[str, Color]:
    """A colour per arm."""
    return dict(zip(result.arms, cycle(ARM_COLORS)))


def _curve(arm: ArmResult, fit: WidthFit, color: Color, rank: int) -> list[Mark]:
    """One width in one panel."""
    cells, bowls = fit.cells, fit.bowls
    tags = {"arm": arm.arm, "width": str(fit.width)}
    name = f"{arm.arm}, width {fit.width}"
    lr = 2**cells.log2_lr
    seed, column = np.nonzero(np.isfinite(cells.losses))
    near = np.linspace(bowls.left[0], bowls.right[0], 61)
    bowl = bowls.a[0] + (near - bowls.center[0]) * (bowls.b[0] + (near - bowls.center[0]) * bowls.c[0])
    notes = [f"curvature {fit.curvature:.4f} nats per octave squared", *fit.problems]
    if not math.isnan(fit.optimum_se):
        notes.append(f"known to \N{PLUS-MINUS SIGN} {fit.optimum_se:.2f} octaves")
    note = "; ".join(notes)
    best: dict[str, Any] = {"symbol": "D", "size": 5.5, "hollow": bool(fit.problems), "notes": [note]}
    return [
        Mark(
            "points", lr[column], cells.losses[seed, column], color, f"{name}, one seed", tags, size=1.8, opacity=0.45
        ),
        Mark("line", lr, cells.mean, color, f"{name}, mean over seeds", tags, size=0.9),
        Mark("line", 2**near, bowl, color, tags=tags, size=2.6, opacity=0.4),
        Mark("points", [2**fit.optimum], bowls.floor[:1], color, f"{name}: best {knob_name(arm.knob)}", tags, **best),
        Mark("cross", [2**x for x in cells.diverged], [rank] * len(cells.diverged), color, tags=tags),
    ]


def _loss_limits(fits: Sequence[WidthFit]) -> tuple[float, float]:
    """Limits that show every bowl whole, with room for crosses above; cliffs leave through the top."""
    lowest = min(float(fit.cells.mean.min()) for fit in fits)
    shown = [(fit.cells.log2_lr >= fit.bowls.left[0]) & (fit.cells.log2_lr <= fit.bowls.right[0]) for fit in fits]
    highest = max(float(fit.cells.mean[near].max()) for fit, near in zip(fits, shown))
    height = highest - lowest
    return lowest - 0.08 * height, highest + (0.3 if any(fit.cells.diverged for fit in fits) else 0.1) * height


def interval_text(estimate: Estimate | None, form: str = "{:+.2f}") -> str:
    """A number for a reader: its value and, if known, its 90 % interval."""
    if estimate is None:
        return "unknown"
    low, high = estimate.interval()
    text = form.format(estimate.value)
    if not math.isnan(low):
        text += f" [{form.format(low)}, {form.format(high)}]"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float) -> str:
    """With its sign and two digits."""
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def drift(result: TransferResult) -> Figure:
    """Optimum against width, a colour per arm, each shifted so that its fitted line starts at 0 at its base width.

    Bars: 90 % of a normal error. Lines: the fitted drift, shaded over its 90 % interval. Grey: drifts that count as
    transfer. Squares are controls; a hollow mark is an optimum that does not enter the line. Raises TransferError.
    """
    drifts = {name: (arm, arm.drift) for name, arm in result.arms.items() if arm.drift is not None}
    if not drifts:
        raise TransferError("no arm has a drift to draw; each needs two widths with an optimum")
    widths = sorted({fit.width for arm, _ in drifts.values() for fit in arm.fits})
    ends = np.log2([widths[0], widths[-1]]) + np.array([-0.15, 0.15])
    limit, colors = result.thresholds.equivalence, arm_colors(result)
    marks: list[Mark] = []
    for base in sorted({arm.base_width for arm, _ in drifts.values()}):
        x = np.sort([*ends, math.log2(base)]) - math.log2(base)
        marks.append(Mark("band", base * 2**x, low=-limit * np.abs(x), high=limit * np.abs(x), color=BAND))
    for name, (arm, slope) in drifts.items():
        marks += _drift(arm, slope, colors[name], ends)
    keys = [Key(f"\N{PLUS-MINUS SIGN}{limit:g}", "band", BAND)]
    keys += [
        Key(f"{name}: {interval_text(slope)}", "points", colors[name], _symbol(arm))
        for name, (arm, slope) in drifts.items()
    ]
    caption = (
        f"How far the best {knob_name(result.knob)} moves with width. Lines: the drift in octaves per doubling of width, "
        "shaded over its 90 % interval; bars: 90 % of each optimum; hollow: does not count. Grey: drifts that pass as transfer."
    )
    y = Axis(f"shift of the best {knob_name(result.knob)} (octaves)")
    return Figure("drift", caption, Axis("width", "log2", ticks=widths), y, [Panel("", marks)], keys, size=(3.6, 2.9))


def _symbol(arm: ArmResult) -> str:
    return "o" if arm.predicted is None else "s"


def _drift(arm: ArmResult, slope: Estimate, color: Color, ends: Array) -> list[Mark]:
    """One arm's optima, line and interval; `ends` (2,) are the limits in log2 width."""
    start, tags = math.log2(arm.base_width), {"arm": arm.arm}
    doublings = np.log2([fit.width for fit in arm.usable]) - start
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
        notes = ["; ".join([f"best {knob_name(arm.knob)} 2^{fit.optimum:.2f}", *fit.problems])]
        tag = tags | {"width": str(fit.width)}
        style: dict[str, Any] = {"symbol": _symbol(arm), "size": 4.5, "hollow": bool(fit.problems)}
        style |= {"low": [at - bar], "high": [at + bar], "notes": notes}
        marks.append(Mark("points", [fit.width], [at], color, arm.arm, tag, **style))
    return marks


def best_losses(result: TransferResult, promised: Sequence[Mark] = ()) -> Figure:
    """Loss at the best learning rate of each width, with 90 % intervals: a parametrization can transfer and still lose.

    promised: points for a target run, such as what was predicted and what was measured.
    """
    marks: list[Mark] = []
    colors = arm_colors(result)
    for name, arm in result.arms.items():
        tags = {"arm": name}
        losses = [arm.best_loss(fit) for fit in arm.usable]
        widths, values = [fit.width for fit in arm.usable], [loss.value for loss in losses]
        marks.append(Mark("line", widths, values, colors[name], tags=tags, size=1.1))
        for width, loss in zip(widths, losses):
            low, high = loss.interval()
            style: dict[str, Any] = {"symbol": _symbol(arm), "size": 4.5}
            if not math.isnan(low):
                style |= {"low": [low], "high": [high]}
            marks.append(
                Mark("points", [width], [loss.value], colors[name], name, tags | {"width": str(width)}, **style)
            )
    keys = [Key(name, "points", colors[name], _symbol(arm)) for name, arm in result.arms.items()]
    ticks = {float(fit.width) for arm in result.arms.values() for fit in arm.fits}
    best = f"loss at the best {knob_name(result.knob)}"
    caption = f"{best.capitalize()} of each width, with 90 % intervals."
    marks += promised
    keys += [Key(mark.name, mark.kind, mark.color, mark.symbol, hollow=mark.hollow) for mark in promised]
    ticks |= {width for mark in promised for width in mark.x}
    x, y = Axis("width", "log2", ticks=sorted(ticks)), Axis(best)
    return Figure("best-loss", caption, x, y, [Panel("", marks)], keys, size=(3.6, 2.6))


def training_curves(result: TransferResult, curves: Mapping[CurveKey, Array]) -> Figure:
    """Training loss against step, a panel per arm and a colour per width, mean over seeds; the reader picks the rate.

    First shown is the rate at which "wider is better" was judged, else that nearest to the base width's optimum.
    """
    colors, knob = width_colors(result), knob_name(result.knob)
    tables: dict[tuple[str, int, float], list[Array]] = {}
    for (owner, width, lr, _), curve in sorted(curves.items()):
        tables.setdefault((owner, width, round(math.log2(lr), 6)), []).append(curve)
    rates = sorted({at for _, _, at in tables})
    own = "nearest to the best of the base width"
    panels, shown, judged = [], [], []
    for name, arm in result.arms.items():
        chosen = _judged_rate(arm, [at for owner, _, at in tables if owner == name])
        marks = []
        for (owner, width, at), some in tables.items():
            if owner != name or width not in colors:
                continue
            steps, loss = _thin(np.mean(some, axis=0))
            label = f"{name}, width {width}, {knob} {2**at:.3g}"
            tags = {"arm": name, "width": str(width), "rate": f"{2**at:.3g}"}
            marks.append(Mark("line", steps, loss, colors[width], label, tags, size=1.1))
            if at == chosen:
                marks.append(Mark("line", steps, loss, colors[width], label, tags | {"rate": own}, size=1.1))
                shown.append((steps, loss))
        panels.append(Panel(_title(arm), marks, {"arm": name}))
        judged.append(f"{name} {2**chosen:.3g}")
    late = np.concatenate([loss[steps >= 0.1 * steps[-1]] for steps, loss in shown])
    room = 0.05 * float(late.max() - late.min())
    limits = (float(late.min()) - room, float(late.max()) + room)
    keys = [Key(f"width {width}", "line", color) for width, color in colors.items()]
    caption = (
        f"Training loss, mean over seeds and over neighbouring steps, at one {knob} for all widths: that nearest to "
        f"the best of the base width ({', '.join(judged)}). With the right rules a wider model is better at every step."
    )
    choice = Choice("rate", knob, [own, *(f"{2**at:.3g}" for at in rates)])
    return Figure("training-curves", caption, Axis("step"), Axis("training loss", limits=limits), panels, keys, choice)


def _judged_rate(arm: ArmResult, rates: Sequence[float]) -> float:
    if arm.wider:
        return arm.wider.log2_lr
    optimum = arm.fits[0].optimum if arm.fits else 0.0
    return min(rates, key=lambda at: abs(at - optimum))


def _thin(curve: Array) -> tuple[Array, Array]:
    """Steps and losses of a curve (T, 2) up to where it diverges, averaged to MOST_STEPS points or fewer."""
    curve = curve[: int(np.isfinite(curve[:, 1]).cumprod().sum())]
    block = max(1, math.ceil(len(curve) / MOST_STEPS))
    means = [curve[at : at + block].mean(axis=0) for at in range(0, len(curve), block)]
    steps, losses = np.array(means).reshape(-1, 2).T
    return steps, losses
