"""Figures as PNG, SVG or PDF, for papers."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speedrun_mup.pictures import picture, plain
from speedrun_mup.report.contents import Axis, Figure, Key, Mark

MOST_COLUMNS = 3
LEAST_WIDTH = 5.0  # inches
LETTER = 0.062  # inches
_DOTTED = (0, (1, 1.5))


def draw(figure: Figure, path: Path) -> None:
    """Write `figure` to `path`, whose suffix names the format; the same figure gives the same bytes.

    Raises:
        PictureError: in one line, for whatever keeps it from being drawn or written.
    """
    options = _options(figure)
    rows = math.ceil(len(figure.panels) / MOST_COLUMNS) if len(options) == 1 else len(options)
    columns = math.ceil(len(figure.panels) * len(options) / rows)
    width, height = figure.size
    wide = max(width * columns, LEAST_WIDTH) + 0.5
    legend = _columns(figure.keys, wide)
    below = 0.18 * math.ceil(len(figure.keys) / legend)
    with picture(path, (wide, (height + 0.3) * rows + below)) as canvas:
        axes = canvas.subplots(rows, columns, sharex=True, sharey="row" if len(options) > 1 else True, squeeze=False)
        for spare in axes.flat[len(figure.panels) * len(options) :]:
            spare.remove()
        for (option, panel), drawn in zip(itertools.product(options, figure.panels), axes.flat):
            for mark in panel.marks:
                if not figure.choice or mark.tags.get(figure.choice.tag) in (None, option):
                    _draw_mark(drawn, mark)
            drawn.set_title(_title(panel.title, wide / columns) if option == options[0] else "", loc="left")
            drawn.set_xlabel(plain(figure.x.label))
            drawn.tick_params(labelbottom=True)
        _set_axis(axes[0, 0], "x", figure.x)
        for row, drawn in enumerate(axes[:, 0]):
            _set_axis(drawn, "y", figure.y)
            drawn.set_ylabel(plain(f"{figure.y.label} of {options[row]}" if len(options) > 1 else figure.y.label))
        if figure.keys:
            _draw_legend(canvas, figure.keys, legend)


def _options(figure: Figure) -> Sequence[str]:
    """Which options of a figure's choice the picture has, a row each; one without a name if there is no choice."""
    return (figure.choice.printed or figure.choice.options[:1]) if figure.choice else [""]


def _title(text: str, width: float) -> str:
    """Lines no longer than a panel so many inches wide, so that names do not run into the next one."""
    lines = (line for part in text.split("\n") for line in textwrap.wrap(part, int(0.88 * width / LETTER)))
    return "\n".join(map(plain, lines))


def _columns(keys: Sequence[Key], width: float) -> int:
    """Of a legend that lies under a picture so many inches wide: as many as fit."""
    needs = [0.55 + LETTER * min(80, len(key.label)) for key in keys]
    for columns in range(len(keys), 1, -1):
        rows = math.ceil(len(keys) / columns)
        widths = [max(needs[at : at + rows]) for at in range(0, len(keys), rows)]
        if sum(widths) <= width:
            return len(widths)
    return 1


def _draw_legend(canvas: Any, keys: Sequence[Key], columns: int) -> None:
    """Labels are set afterwards, because matplotlib leaves out those that begin with an underscore."""
    legend = canvas.legend(
        [_handle(key) for key in keys], ["key"] * len(keys), loc="outside lower center", ncols=columns
    )
    for key, text in zip(keys, legend.get_texts()):
        text.set_text(plain(key.label))


def _draw_mark(drawn: Any, mark: Mark) -> None:
    style: dict[str, Any] = {"color": mark.color[0], "alpha": mark.opacity}
    if mark.kind == "band":
        drawn.fill_between(mark.x, mark.low, mark.high, linewidth=0, zorder=0.5, **style)
    elif mark.kind == "rule":
        for x in mark.x:
            drawn.axvline(x, linestyle=_DOTTED, linewidth=mark.size, zorder=1, **style)
    elif mark.kind == "line":
        if mark.marked:
            style |= {"marker": mark.symbol, "markersize": 3.2, "markeredgewidth": 0}
        drawn.plot(mark.x, mark.y, linestyle=_DOTTED if mark.dotted else "-", linewidth=mark.size, **style)
    elif mark.kind == "cross":
        height = [0.975 - 0.04 * row for row in mark.y]
        drawn.plot(mark.x, height, "x", markersize=3.5, transform=drawn.get_xaxis_transform(), **style)
    else:
        for x, low, high in zip(mark.x, mark.low, mark.high):
            drawn.plot([x, x], [low, high], "_-", linewidth=1, markersize=4, **style)
        drawn.plot(mark.x, mark.y, mark.symbol, markersize=mark.size, zorder=4, **_point_style(mark), **style)


def _point_style(mark: Mark | Key) -> dict[str, Any]:
    """Filled, or hollow; diamonds lie on top of lines and get a white edge."""
    if mark.hollow:
        return {"markerfacecolor": "white", "markeredgewidth": 0.9}
    return {"markeredgecolor": "white"} if mark.symbol == "D" else {"markeredgewidth": 0}


def _set_axis(drawn: Any, name: str, wanted: Axis) -> None:
    """Scale, limits and ticks of the x or y axis, which all panels share."""
    from matplotlib import ticker

    axis = getattr(drawn, f"{name}axis")
    if wanted.scale != "linear":
        getattr(drawn, f"set_{name}scale")("log", base=2 if wanted.scale == "log2" else 10)
    if wanted.limits:
        getattr(drawn, f"set_{name}lim")(*wanted.limits)
    if wanted.scale == "log2":
        axis.set_major_locator(ticker.LogLocator(base=2, numticks=10))
        axis.set_major_formatter(lambda value, _: f"$2^{{{math.log2(value):g}}}$")
    elif wanted.scale == "log":
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=8))
        axis.set_major_formatter(lambda value, _: f"{value:.0%}" if wanted.percent else f"{value:g}")
    elif wanted.percent:
        axis.set_major_formatter(ticker.PercentFormatter(1))
    if wanted.ticks:
        axis.set_major_locator(ticker.FixedLocator(wanted.ticks))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(ticker.NullLocator())


def _handle(key: Key) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if key.kind == "band":
        return Patch(color=key.color[0], linewidth=0, label=key.label)
    if key.kind == "line":
        style: dict[str, Any] = {"marker": key.symbol, "markersize": 4, "markeredgewidth": 0} if key.marked else {}
        style |= {"linestyle": _DOTTED if key.dotted else "-", "linewidth": 1.6}
        return Line2D([], [], color=key.color[0], label=key.label, **style)
    symbol = "x" if key.kind == "cross" else key.symbol
    size = 4 if key.kind == "cross" else 5
    style = {} if key.kind == "cross" else _point_style(key)
    return Line2D([], [], color=key.color[0], linestyle="", marker=symbol, markersize=size, label=key.label, **style)
